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

what=$1
words=$t/$what.argv
set -- $bb env -i
while IFS= read -r -d '' variable; do
    # Only commands of ours to a shell of ours find its applets: the image has no shell.
    case $variable in
        PATH=*) [ -e "$words" ] || [ "$shell" = /bin/sh ] || variable=$variable:$t/bin ;;
    esac
    set -- "$@" "$variable"
done <$t/env
if [ -e "$words" ]; then
    # The image's own: started as Docker starts them, without a shell.
    while IFS= read -r -d '' word; do
        set -- "$@" "$word"
    done <"$words"
else
    set -- "$@" "$shell" -c "$($bb cat "$t/$what.command")"
fi
read -r uid gid groups _ <$t/user
[ "$groups" != - ] || groups=
exec $t/setpriv/ld.so --library-path $t/setpriv $t/setpriv/setpriv \
    --reuid "$uid" --regid "$gid" --groups "$gid${groups:+,$groups}" -- "$@"
