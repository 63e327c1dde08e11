# Gives a guest a machine id of its own as soon as its kernel says that it has become another machine:
# a resumed snapshot whose VMM tells a new generation id (VMGenID). The kernel's random numbers are
# new by then. Argument: the kernel's messages, as /dev/kmsg has them.
set -u
t=/.template
bb=$t/busybox
kmsg=$1
seen=-1

# `<priority>,<number>,<time>,<flags>;<text>`; the kernel's own have a priority below 8.
tells_of_a_fork() { # line
    case $1 in
        [0-7],*';random: crng reseeded due to virtual machine fork') ;;
        *) return 1 ;;
    esac
    number=${1#*,}
    number=${number%%,*}
    [ "$number" -gt $seen ] || return 1
    seen=$number
}

# In place: systemd may have mounted something over it.
renew_machine_id() {
    [ -s /etc/machine-id ] || return 0
    $bb tr -d - </proc/sys/kernel/random/uuid >/etc/machine-id
}

# cat reads whole records; it ends when the kernel has thrown away what it has not read.
while :; do
    $bb cat "$kmsg"
    $bb sleep 1
done | while IFS= read -r line; do
    if tells_of_a_fork "$line"; then renew_machine_id; fi
done
