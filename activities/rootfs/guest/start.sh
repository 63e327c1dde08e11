# Runs the start command, waits until the ready command succeeds, and says on the serial console
# what happens. Arguments: what the init is (systemd, other, added), and its path.
#
# What it says on the console is init (by /.template/init), start, out, err, start-exit, ready-out,
# ready-attempt, ready, failed; out-part and err-part are the beginnings of lines.
set -u
. /.template/common.sh
# What the ready command's first attempt may take. One that has taken all of it may take LONGER times
# as much the next time: it may be one that hangs, or `sleep 60`, which never ends sooner.
FIRST_SECONDS=30
LONGER=4
READY_BYTES=1048576
LINE_CHARS=2000
# More of it in a row is a flood: what the pipes hold, and as much again.
FLOOD_CHUNKS=64
FLOOD_SECONDS=2
TELLINGS=60
# Of free memory: how much is cleared in any case, and in what time that is quick.
CLEARED_MB=64
QUICK_HUNDREDTHS=20
CLEARING_SECONDS=10
RESERVE_MB=4
ready_out=$state/ready/out
AGENT_PORT=C33F # 49983

# Says what comes when it comes: a prompt has no newline, and a program may wait for ever after it.
relay() { # kind
    clean | {
        told=0 full=0 lines=0
        while read_chunk; do
            say_chunk "$1" "${chunk%.}"
            [ -e $state/is-ready ] && break
            told=$((told + 1))
            echo $told >"$state/$1.told"
            [ ${#chunk} -gt $CHUNK_BYTES ] && full=$((full + 1)) || full=0
            [ $full -lt $FLOOD_CHUNKS ] || skip "$1"
        done
        pass_on
    }
    : >"$state/$1.done"
}

# The console takes a byte at a time, and a program must not wait for it: of a flood it is said how
# much it was, and its end. What `&` has started ignores SIGINT, by which dd ends and tells that; a
# block that it has read and not written, it does not count. One dd for all of the time: where a CPU
# is emulated, each program that is started costs memory.
skip() { # kind
    of_host env --default-signal=INT $bb timeout -s INT $FLOOD_SECONDS $dd bs=4k 2>"$state/$1.count" |
        $bb tail -c $CHUNK_BYTES >"$state/$1.end"
    count=$($bb sed -n '$s/ .*//p' "$state/$1.count")
    case $count in
        '' | *[!0-9]*) count=0 ;;
    esac
    end=$($bb cat "$state/$1.end" && echo .)
    end=${end%.}
    [ $count -lt $CHUNK_BYTES ] || end=${end#*"$newline"}
    left_out=$((count - ${#end}))
    [ $left_out -le 0 ] || say_chunk "$1" "$newline[$left_out bytes or more are left out here]$newline"
    say_chunk "$1" "$end"
}

# A program of the host's, with its own loader, as in run.sh.
of_host() { # name, arguments
    name=$1
    shift
    $t/tools/ld.so --library-path $t/tools --argv0 "$name" "$t/tools/$name" "$@"
}
dd="$t/tools/ld.so --library-path $t/tools --argv0 dd $t/tools/dd"

# After the snapshot nobody may be reading the console, or its interrupt may be lost. The start
# command must not stop for that: what the console does not take in time is thrown away.
pass_on() {
    while read_chunk; do
        printf '%s' "${chunk%.}" | $bb timeout 2 $bb cat >$console || break
    done
    $bb cat >/dev/null
}

await_end() {
    read -r code <$state/ended
    # Its output comes first, while it comes. A daemon that it left may hold the pipes open.
    tries=0 quiet=0 before=
    while [ $tries -lt 1000 ] && [ $quiet -lt 50 ]; do
        [ -e $state/out.done ] && [ -e $state/err.done ] && break
        $bb usleep 20000
        out=0 err=0
        [ ! -e $state/out.told ] || read -r out <$state/out.told
        [ ! -e $state/err.told ] || read -r err <$state/err.told
        [ "$out $err" = "$before" ] && quiet=$((quiet + 1)) || quiet=0
        before="$out $err"
        tries=$((tries + 1))
    done
    # Said first: what follows from the file is said after it.
    say start-exit "$code"
    echo "$code" >$state/start-exit.new
    $bb mv $state/start-exit.new $state/start-exit
}

start_has_failed() {
    [ -e $state/start-exit ] || return 1
    read -r code <$state/start-exit
    [ "$code" != 0 ]
}

# The ready command's output is a file, for its daemons may keep it open: one that cannot grow into
# the guest's memory.
bound_ready_output() {
    $bb mkdir $state/ready
    $bb mount -t tmpfs -o mode=755,size=$READY_BYTES,nosuid,nodev,noexec tmpfs $state/ready
}

is_ready() { # attempt
    : >$ready_out
    $bb chmod 622 $ready_out
    tried_at=$(whole_seconds)
    $bb setsid $bb timeout -k 2 $attempt_seconds $bb sh $t/run.sh ready \
        </dev/null >$ready_out 2>&1 3>&-
    code=$?
    took=$(($(whole_seconds) - tried_at))
    if [ $code -ge 128 ] && read -r group <$state/ready.pid; then
        $bb kill -KILL -"$group" 2>/dev/null
    fi
    say_ready_output
    if [ $code != 0 ] && [ $took -ge $attempt_seconds ]; then
        cut="ended after $attempt_seconds s"
        attempt_seconds=$((attempt_seconds * LONGER))
        say ready-out "[$cut; the next attempt may take $attempt_seconds s]"
    fi
    say ready-attempt "$1 $code"
    [ $code = 0 ]
}

# The same words at every attempt would fill the log: they are said when they change.
say_ready_output() {
    $bb tail -n 20 $ready_out | $bb tail -c 8192 | clean >$state/ready-out.new
    [ "$($bb stat -c %s $ready_out)" -lt $READY_BYTES ] ||
        printf '\n[there is no room for more than %s bytes of output]\n' $READY_BYTES \
            >>$state/ready-out.new
    $bb cmp -s $state/ready-out.new $state/ready-out.said 2>/dev/null && return
    while IFS= read -r -n $LINE_CHARS line || [ -n "$line" ]; do
        say ready-out "$line"
    done <$state/ready-out.new
    $bb mv $state/ready-out.new $state/ready-out.said
}

wait_until_ready() {
    attempt=0
    attempt_seconds=$FIRST_SECONDS
    pause=200000
    while :; do
        attempt=$((attempt + 1))
        is_ready $attempt && break
        start_has_failed && return 1
        require_devices
        $bb usleep $pause
        [ $pause -ge 1000000 ] || pause=$((pause + 100000))
    done
    outlives_its_first_second
}

# A ready command that always succeeds, or none, must not hide that there is no such start command.
# Counted, not only timed: where a guest is slow, each of these is, too.
outlives_its_first_second() {
    has_start_command || return 0
    tries=0
    while [ ! -e $state/start-exit ] && { [ $tries -lt 50 ] || [ "$(age)" -lt 100 ]; }; do
        $bb usleep 20000
        tries=$((tries + 1))
    done
    ! start_has_failed
}

whole_seconds() { # since the kernel's start
    read -r up _ </proc/uptime
    echo "${up%.*}"
}

age() { # since the start command was started, in hundredths of a second
    read -r up _ </proc/uptime
    echo $((${up%.*}${up#*.} - began))
}

get_ready() {
    attempt=0
    by=
    if [ -s $t/ready.command ]; then
        bound_ready_output
        wait_until_ready
    else
        has_start_command && by=time
        outlives_its_first_second
    fi
}

has_start_command() {
    [ -s $t/start.argv ] || [ -s $t/start.command ]
}

# What decides a build is said until it is heard: a line on the console may get lost where the host is
# too busy to read it. Who has heard it pauses the guest for the snapshot, or kills it.
keep_saying() { # kind, text
    told=0
    while [ $told -lt $TELLINGS ]; do
        if [ "$1" = failed ] && start_has_failed; then say start-exit "$code"; fi
        say "$1" "$2"
        told=$((told + 1))
        $bb sleep 1
    done
}

# Without it nothing of ours can be started.
require_devices() {
    [ -c /dev/null ] ||
        keep_saying failed "the image's init has mounted something over /dev that has no devices"
}

# By the host's KERNEL_ARGUMENTS, to compare: `kept` leaves the guest's memory as it is, with `cleared`
# all that is free is cleared, as where that is quick.
memory_is() { # which
    $bb grep -qw "template.memory=$1" /proc/cmdline
}

# What has been read to boot is not kept in the snapshot. What the commands read comes after this.
forget_boot() {
    ! memory_is kept || return
    $bb sync
    echo 3 >/proc/sys/vm/drop_caches
} 2>/dev/null

# A page that was used and freed keeps its content, which would be stored with the snapshot. The kernel
# clears what it hands out, first what was freed last: a program that takes memory and ends leaves
# zeros. All that is free, where that is quick.
clear_free_memory() {
    ! memory_is kept || return
    read -r up _ </proc/uptime
    before=${up%.*}${up#*.}
    take_and_free $CLEARED_MB
    read -r up _ </proc/uptime
    [ $((${up%.*}${up#*.} - before)) -ge $QUICK_HUNDREDTHS ] && ! memory_is cleared ||
        take_and_free 1048576
} 2>/dev/null

take_and_free() { # how many MiB at most
    free_mb
    [ "$free" -lt "$1" ] || free=$1
    [ "$free" -gt 0 ] || return
    # Who is short of memory meanwhile has this killed first.
    (
        echo 1000 >/proc/self/oom_score_adj
        exec $bb timeout -s KILL $CLEARING_SECONDS \
            $dd if=/dev/zero of=/dev/null bs="${free}M" count=1 iflag=fullblock
    )
}

# Less what keeps the kernel from looking for more: a 64th of all.
free_mb() { # leaves it in `free`
    free=0
    while read -r name kib _; do
        case $name in
            MemTotal:) total=$kib ;;
            MemFree:) free=$(((kib - total / 64) / 1024 - RESERVE_MB)) ;;
        esac
    done </proc/meminfo
}

# In the snapshot it must be able to answer at once: whoever resumes one speaks to it first.
await_agent() {
    [ "$agent" ] || return 0
    why='the guest agent has ended, and nothing listens on port 49983'
    tries=0
    until agent_listens; do
        [ -e /proc/$agent/root/. ] || tries=$((tries + 1))
        [ $tries -lt 50 ] || return 1
        $bb usleep 100000
    done
}

# It may listen on an address of either kind, in whatever state the others are (0A is LISTEN).
agent_listens() {
    $bb cat /proc/net/tcp /proc/net/tcp6 2>/dev/null |
        $bb grep -q "^ *[0-9]*: [0-9A-F]*:$AGENT_PORT [0-9A-F:]* 0A "
}

settle_boot "$1"
# Held open, so that closing it after a line does not wait for the line to be sent.
exec 3>$console
say start "$*"
require_devices
if [ -e $state/machine-id-is-made ] && { [ "$1" != added ] || [ -e /etc/machine-id ]; }; then
    $bb setsid $bb sh $t/on-fork.sh /dev/kmsg </dev/null >/dev/null 2>&1 &
fi
forget_boot
read -r up _ </proc/uptime
began=${up%.*}${up#*.}
if has_start_command; then
    relay_output
    run_start_command
    await_end &
fi
agent=
if [ -x $t/agent ]; then
    $bb setsid $t/agent </dev/null >/dev/null 2>&1 &
    agent=$!
fi
why='the start command ended before the guest was ready'
if get_ready && await_agent; then
    clear_free_memory
    : >$state/is-ready
    $bb sync
    keep_saying ready "$attempt $by"
else
    keep_saying failed "$why"
fi
stay
