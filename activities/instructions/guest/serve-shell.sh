# Lets who looks at a disk have a shell on it, under the image's own init, as often as they connect.
# Arguments: what the init is (systemd, other, added), and its path. Nobody can but from the host, in
# the network namespace of this VM. It says `start` on the console.
set -u
. /.template/common.sh

settle_boot "$1"
say start "$*"
# Not with -K: that closes the connection when the shell ends, before what it said last is sent.
$bb telnetd -F -p "$($bb cat $t/port)" -l $t/shell &
stay
