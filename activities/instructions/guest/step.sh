# Runs a RUN under the image's own init, and brings the disk to rest after it. Arguments: what the
# init is (systemd, other, added), and its path.
#
# Says lines `@tm@ <kind> <text>`: start, out, err, out-part and err-part (beginnings of lines), cut,
# exit <code> <what it ran out of>, done.
set -u
t=/.template
bb=$t/busybox
state=$t/run
console=/dev/ttyS0
MAX_LINES=5000
MAX_CHARS=2097152
LAST_LINES=20
LAST_BYTES=8192
CHUNK_BYTES=4096
MAX_TASKS=4096
group=/sys/fs/cgroup/template-step
newline='
'

say() { # kind, text
    printf '\n@tm@ %s %s\n' "$1" "$2" >$console
}

# Control characters become spaces, but for tab, the \r of a progress bar, and what colours and titles
# are made of: the host makes these readable.
clean() {
    $bb tr '\000-\006\010\013\014\016-\032\034-\037\177' ' '
}

# Says what comes when it comes, up to a limit; then only the last lines, which say why it failed.
relay() { # kind
    trap '' TERM # who is asked to end may have last words
    clean | {
        lines=0 chars=0
        while chunk=$($bb dd bs=$CHUNK_BYTES count=1 2>/dev/null && echo .) && [ "$chunk" != . ]; do
            say_chunk "$1" "${chunk%.}"
            chars=$((chars + ${#chunk}))
            [ $lines -lt $MAX_LINES ] && [ $chars -lt $MAX_CHARS ] || break
        done
        say_last "$1"
    }
    : >"$state/$1.done"
}

say_chunk() { # kind, text
    rest=$2
    while :; do
        case $rest in
            *"$newline"*) ;;
            *) break ;;
        esac
        lines=$((lines + 1))
        say "$1" "${rest%%"$newline"*}"
        rest=${rest#*"$newline"}
    done
    [ -z "$rest" ] || { lines=$((lines + 1)); say "$1-part" "$rest"; }
}

say_last() { # kind
    $bb tail -c $LAST_BYTES | $bb tail -n $LAST_LINES >"$state/$1.last"
    [ -s "$state/$1.last" ] || return 0
    say cut ''
    while IFS= read -r line || [ -n "$line" ]; do say "$1" "$line"; done <"$state/$1.last"
}

# In a control group of its own, so that its processes are counted. systemd has made one.
limit_tasks() { # kind of init
    if [ "$1" = systemd ]; then
        read -r line </proc/self/cgroup
        group=/sys/fs/cgroup${line#0::}
        return
    fi
    echo +pids >/sys/fs/cgroup/cgroup.subtree_control
    $bb mkdir -p $group && echo $MAX_TASKS >$group/pids.max && echo $$ >$group/cgroup.procs
} 2>/dev/null

run_command() {
    $bb mkfifo -m 622 $state/out $state/err
    $bb mkfifo $state/ended
    relay out <$state/out &
    relay err <$state/err &
    # Not by `&`: a shell lets what it starts so ignore SIGINT and SIGQUIT.
    $bb start-stop-daemon -S -b -p $state/none -x $bb -- sh $t/start-command.sh
    read -r code <$state/ended
    # Its output comes first. A daemon that it left may hold the pipes open, so not for long.
    tries=0
    while [ $tries -lt 100 ] && ! { [ -e $state/out.done ] && [ -e $state/err.done ]; }; do
        $bb usleep 20000
        tries=$((tries + 1))
    done
}

ran_out_of() {
    $bb dmesg | $bb grep -q 'Out of memory: Killed process' && echo memory && return
    while read -r what count; do
        [ "$what" = max ] && [ "$count" != 0 ] && echo processes && return
    done 2>/dev/null <"$group/pids.events"
    [ "$($bb stat -f -c %a /)" != 0 ] || echo disk
}

# As at the end of a container nothing goes on, but whatever there is may end by itself. Not by an
# isolate of systemd's: it stops mounts, too, and this script is on one.
stop_everything() {
    others >$state/others
    # The shell's own: it spares the shell itself.
    kill -TERM -1
    tries=0
    while [ $tries -lt 100 ] && are_there; do
        $bb usleep 50000
        tries=$((tries + 1))
    done
    kill -KILL -1
}

# Neither the kernel's own threads nor what has ended have a command line.
others() {
    for process in /proc/[0-9]*; do
        pid=${process#/proc/}
        [ "$pid" = 1 ] || [ "$pid" = $$ ] || { is_alive "$pid" && echo "$pid"; }
    done
}

is_alive() { # pid
    line=
    read -r line <"/proc/$1/cmdline"
    [ -n "$line" ]
} 2>/dev/null

are_there() {
    while read -r pid; do
        is_alive "$pid" && return
    done <$state/others
    return 1
}

# An id that the boot of this step has made is no part of what the step has made.
forget_machine_id() {
    [ -e $state/machine-id-is-made ] || return 0
    [ "$($bb cat /etc/machine-id 2>/dev/null)" = "$machine_id" ] || return 0
    if [ -e $t/machine-id.none ]; then
        $bb rm -f /etc/machine-id
    else
        : >/etc/machine-id
    fi
} 2>/dev/null

umask 022
ulimit -n 1048576 2>/dev/null
# Held open, so that closing it after a line does not wait for the line to be sent.
exec 3>$console
say start "$*"
machine_id=$($bb cat /etc/machine-id 2>/dev/null)
limit_tasks "$1"
run_command
if [ "$code" = 0 ]; then
    say exit 0
    stop_everything
    forget_machine_id
    $bb sync
    $bb fsfreeze --freeze / && say done ''
else
    say exit "$code $(ran_out_of)"
fi
# systemd would end what belongs to a service when its first process ends.
while :; do
    $bb sleep 2147483647 &
    wait
done
