# Asks its surroundings what they are: run by a static busybox in a container and in a guest of one
# image. Each answer stands in /probe/out/<name>; `done` comes last. Its arguments are probes, too.
set -u
b=/probe/busybox
out=/probe/out

probe() { # name, then a command for a shell
    name=$1
    shift
    { $b sh -c "$1"; echo "exit code $?"; } >$out/$name.new 2>&1
    $b mv $out/$name.new $out/$name
}

# What is about this process itself, and so not asked in another.
for argument in "$@"; do printf '<%s>\n' "$argument"; done >$out/arguments
$b tr '\0' '\n' </proc/$$/environ | $b sort >$out/environment
$b tr '\0' '\n' </proc/$$/cmdline >$out/command-line
$b grep -E '^(Uid|Gid|Groups|NoNewPrivs|Sig(Blk|Ign))' /proc/$$/status >$out/identity
$b grep -E '^(Cap|Seccomp:)' /proc/$$/status >$out/capabilities
echo $$ $PPID >$out/process-ids
$b readlink /proc/$$/cwd >$out/directory
for fd in 0 1 2; do [ -p /proc/$$/fd/$fd ] && echo $fd is a pipe; done >$out/pipes
$b readlink /proc/$$/fd/0 >$out/input
for fd in /proc/$$/fd/*; do echo "${fd##*/}"; done | $b grep -v -x 255 | $b sort -n | $b head -n 3 >$out/open-files
for where in /dev/stdout /dev/stderr /proc/self/fd/1; do
    { printf 'written to %s\n' $where >$where; } 2>/dev/null
    echo "$where $?"
done >$out/writing-to-output

probe accounts "$b id"
probe home 'echo "$HOME"; cd && pwd'
probe umask umask
probe open-files-limit 'ulimit -n'
probe core-limit 'ulimit -c'
probe nice "$b nice"
probe out-of-memory 'cat() { while read -r l; do echo "$l"; done; }; cat </proc/self/oom_score_adj'
probe terminal "$b tty"
probe hostname "$b hostname; $b cat /etc/hostname"
probe own-name "$b ping -c 1 -W 2 \$($b hostname) >/dev/null"
probe localhost "$b ping -c 1 -W 2 localhost >/dev/null"
probe loopback "$b ip -4 -o addr show dev lo | $b awk '{print \$4}'"
probe resolver "$b grep nameserver /etc/resolv.conf"
probe names-of-hosts "$b grep -v instance /etc/hosts"
probe mount-table "$b readlink /etc/mtab"
probe ip-six "$b cat /proc/net/if_inet6"
probe low-port "$b timeout 1 $b nc -l -p 80"
probe port-sysctls "$b cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/net/ipv4/ping_group_range"
probe devices "$b stat -c '%n %a %u %g %F %t:%T' /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty"
probe device-links "$b readlink /dev/fd /dev/stdin /dev/stdout /dev/stderr"
probe null-device 'echo lost >/dev/null'
probe shared-memory "$b stat -c '%a %u %g' /dev/shm; echo x >/dev/shm/x; $b ls /dev/shm"
probe shared-memory-size "$b df -k /dev/shm | $b awk 'NR == 2 {print \$2}'"
probe shared-memory-programs "$b cp $b /dev/shm/busybox; /dev/shm/busybox true"
probe message-queues "$b stat -c '%F' /dev/mqueue"
probe root-directory "$b stat -c '%a %u %g' /"
probe temporary "$b stat -c '%a %u %g' /tmp; echo x >/tmp/x"
probe run-directory "$b stat -c '%a %u %g' /run; $b ls -A /run"
probe etc "$b ls -ld /etc/passwd /etc/group /etc/fstab"
probe fstab "$b cat /etc/fstab"
probe working-directory "$b stat -c '%a %u %g' .; echo x >here"
probe machine "$b uname -sm"
probe time-zone "$b date +%Z"
probe shell 'command -v sh; command -v env'
probe mounts "$b awk '{print \$2}' /proc/mounts"
probe kernel "$b uname -r"
probe sys-is-writable '[ -w /sys/kernel ]'
: >$out/done
