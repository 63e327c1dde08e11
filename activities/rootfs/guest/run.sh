# Runs one of the two commands of the template as the image says: its ENV, USER and WORKDIR.
# Argument: start or ready. Every value comes from a file and never becomes part of a script.
set -u
t=/.template
bb=$t/busybox

shell=$t/bin/sh
[ -x /bin/sh ] && shell=/bin/sh
echo $$ >"$t/run/$1.pid"

workdir=$($bb cat $t/workdir)
[ -d "$workdir" ] || $bb mkdir -p -- "$workdir"
cd -- "$workdir" || exit 126

# A program of the host's, with its own loader: no library of the image is in it, and it starts what
# the image's PATH leads to. busybox would start an applet of its own instead, whose name it has.
tool() {
    name=$1
    shift
    exec $t/tools/ld.so --library-path $t/tools --argv0 "$name" "$t/tools/$name" "$@"
}

what=$1
words=$t/$what.argv
set --
while IFS= read -r -d '' variable; do
    # Only commands of ours to a shell of ours find its applets: the image has no shell.
    case $variable in
        PATH=*) [ -e "$words" ] || [ "$shell" = /bin/sh ] || variable=$variable:$t/bin ;;
    esac
    set -- "$@" "$variable"
done <$t/env
if [ -e "$words" ]; then
    # The image's own: started as Docker starts them, without a shell.
    first=yes
    while IFS= read -r -d '' word; do
        # env takes a program whose name has a = for a variable; nice does not, and changes nothing.
        case $first$word in
            yes*=*) set -- "$@" $t/tools/ld.so --library-path $t/tools $t/tools/nice -n 0 ;;
        esac
        first=
        set -- "$@" "$word"
    done <"$words"
elif [ -e $t/$what.login-shell ] && [ -x /bin/bash ]; then
    set -- "$@" /bin/bash -l -c "$($bb cat "$t/$what.command")"
else
    set -- "$@" "$shell" -c "$($bb cat "$t/$what.command")"
fi
read -r uid gid groups _ <$t/user
[ "$groups" != - ] || groups=
tool setpriv --reuid "$uid" --regid "$gid" --groups "$gid${groups:+,$groups}" -- \
    $t/tools/ld.so --library-path $t/tools --argv0 env $t/tools/env -i "$@"
