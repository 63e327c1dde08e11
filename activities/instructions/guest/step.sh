# Runs a RUN under the image's own init, and brings the disk to rest after it. Arguments: what the
# init is (systemd, other, added), and its path.
#
# What it says on the console is start, out, err, out-part and err-part (beginnings of lines), cut,
# exit <code> <what it ran out of>, done.
set -u
. /.template/common.sh
MAX_LINES=5000
MAX_CHARS=2097152
LAST_LINES=20
LAST_BYTES=8192
MAX_TASKS=4096
group=/sys/fs/cgroup/template-step

# Says what comes when it comes, up to a limit; then only the last lines, which say why it failed.
relay() { # kind
    trap '' TERM # who is asked to end may have last words
    clean | {
        lines=0 chars=0
        while read_chunk; do
            say_chunk "$1" "${chunk%.}"
            chars=$((chars + ${#chunk}))
            [ $lines -lt $MAX_LINES ] && [ $chars -lt $MAX_CHARS ] || break
        done
        say_last "$1"
    }
    : >"$state/$1.done"
}

say_last() { # kind
    $bb tail -c $LAST_BYTES | $bb tail -n $LAST_LINES >"$state/$1.last"
    [ -s "$state/$1.last" ] || return 0
    say cut ''
    while IFS= read -r line || [ -n "$line" ]; do say "$1" "$line"; done <"$state/$1.last"
}

# In a control group of its own, without this script: what passes on its last words, and finds out why
# it has failed, must not be kept from starting by it. A systemd too old for one counts by its own.
run_limited() {
    if [ -e /sys/fs/cgroup/cgroup.procs ]; then
        read -r own </proc/self/cgroup
        echo +pids >/sys/fs/cgroup/cgroup.subtree_control
        $bb mkdir -p $group && echo $MAX_TASKS >$group/pids.max && echo $$ >$group/cgroup.procs
        run_start_command
        echo $$ >/sys/fs/cgroup${own#0::}/cgroup.procs
    else
        run_start_command
    fi
} 2>/dev/null

# Its output comes first. A daemon that it left may hold the pipes open, so not for long.
await_end() { # leaves its exit code in `code`
    read -r code <$state/ended
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

# /run is in memory where systemd is the init, and what a RUN has put there belongs to the image, as
# in a container. What systemd and its gettys keep there does not.
list_run() {
    $bb find /run -xdev \( -path /run/systemd -o -path /run/udev -o -path /run/log \
        -o -path /run/initctl -o -path /run/user -o -path /run/utmp \
        -o -path /run/agetty.reload \) -prune \
        -o -exec $bb stat -c '%f %u %g %s %Y %n' {} +
}

keep_run() {
    list_run >$state/run.after
    $bb mkdir $state/disk
    $bb mount --bind / $state/disk
    while read -r _ _ _ _ _ path; do
        [ -e "$path" ] || [ -L "$path" ] || $bb rm -rf "$state/disk$path"
    done <$state/run.before
    $bb grep -Fxvf $state/run.before $state/run.after | while read -r _ _ _ _ _ path; do
        put_on_disk "$path"
    done
    $bb umount $state/disk
}

put_on_disk() { # path; a directory comes before what is in it
    if [ -d "$1" ] && [ ! -L "$1" ]; then
        $bb mkdir -p "$state/disk$1"
        $bb chown "$($bb stat -c %u:%g "$1")" "$state/disk$1"
        $bb chmod "$($bb stat -c %a "$1")" "$state/disk$1"
    else
        $bb rm -rf "$state/disk$1"
        $bb cp -a "$1" "$state/disk$1"
    fi
}

settle_boot "$1"
# Held open, so that closing it after a line does not wait for the line to be sent.
exec 3>$console
say start "$*"
machine_id=$($bb cat /etc/machine-id 2>/dev/null)
[ "$1" != systemd ] || list_run >$state/run.before
relay_output
run_limited
await_end
if [ "$code" = 0 ]; then
    say exit 0
    # Before it stops services: systemd starts some of them again.
    [ "$1" != systemd ] || keep_run
    stop_everything
    forget_machine_id
    $bb sync
    $bb fsfreeze --freeze / && say done ''
else
    why=$(ran_out_of)
    [ ! -e $t/disk-is-kept ] || $bb sync
    say exit "$code $why"
fi
stay
