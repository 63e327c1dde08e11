# Runs one of the two commands of the template as the image says: its ENV, USER and WORKDIR.
# Argument: start or ready. Every value comes from a file and never becomes part of a script.
set -u
t=/.template
bb=$t/busybox

account= uid=0 gid=0 groups=
read -r uid gid groups account <$t/user
shell=$t/bin/sh
[ -x /bin/sh ] && shell=/bin/sh
echo $$ >"$t/run/$1.pid"

workdir=$($bb cat $t/workdir)
[ -d "$workdir" ] || $bb mkdir -p -- "$workdir"
cd -- "$workdir" || exit 126

command=$($bb cat "$t/$1.command")
set --
while IFS= read -r -d '' variable; do
    set -- "$@" "$variable"
done <$t/env
set -- $bb env -i "$@" "$shell" -c "$command"

# busybox has no setgroups(2) but in su, which asks glibc's NSS for the groups. The image's
# nsswitch.conf may name modules that this static busybox cannot load, so it is covered until su has
# become the user.
become_account() {
    covered=
    if [ -e /etc/nsswitch.conf ]; then
        $bb mount -o bind $t/nsswitch.conf /etc/nsswitch.conf && covered=yes
    fi
    $bb mkfifo "$t/run/became.$$"
    {
        read -r _ <"$t/run/became.$$"
        [ -z "$covered" ] || $bb umount /etc/nsswitch.conf
        $bb rm -f "$t/run/became.$$"
    } &
    $bb chmod 666 "$t/run/became.$$"
    # -- ends the options: su would take those of the command for its own.
    exec $bb su -p -s $t/bin/sh -c 'echo >"$0"; exec "$@"' -- "$account" "$t/run/became.$$" "$@"
}

if [ "$groups" != - ]; then become_account "$@"; fi
if [ "$uid:$gid" = 0:0 ]; then exec "$@"; fi
exec $bb start-stop-daemon -S -q -p $t/run/none -c "$uid:$gid" -x "$1" -- "$@"
