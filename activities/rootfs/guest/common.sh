# What start.sh and step.sh share; read by `.`, not run. It says on the serial console what happens:
# lines `@tm@ <kind> <text>`, each after an empty line.
t=/.template
bb=$t/busybox
state=$t/run
console=$state/console
CHUNK_BYTES=4096
newline='
'

say() { # kind, text
    printf '\n@tm@ %s %s\n' "$1" "$2" >$console
}

# Control characters become spaces, but for tab, the \r of a progress bar, and what colours and titles
# are made of: the host makes these readable. busybox's tr passes on what it has at once.
clean() {
    $bb tr '\000-\006\010\013\014\016-\032\034-\037\177' ' '
}

read_chunk() { # leaves it in `chunk`, with a full stop behind it; fails at the end
    chunk=$($bb dd bs=$CHUNK_BYTES count=1 2>/dev/null && echo .) && [ "$chunk" != . ]
}

say_chunk() { # kind, text; counts in `lines`
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

# What systemd has changed is as in a container again: it has had its turn.
settle_boot() { # kind of init
    umask 022
    ulimit -n 1048576 2>/dev/null
    # The kernel counts these by the memory that a guest has: in a container they are the host's.
    ulimit -u unlimited
    ulimit -i unlimited
    if [ "$1" = systemd ]; then
        $bb sh $t/sysctls.sh
        [ ! -r /etc/hostname ] || $bb hostname -F /etc/hostname
    fi
}

# What the start command is to say goes to `relay`, which each script has.
relay_output() {
    $bb mkfifo -m 622 $state/out $state/err
    $bb mkfifo $state/ended
    relay out <$state/out &
    relay err <$state/err &
}

# Its exit code is then read from `ended`.
run_start_command() {
    # Not by `&`: a shell lets what it starts so ignore SIGINT and SIGQUIT.
    $bb start-stop-daemon -S -b -p $state/none -x $bb -- sh $t/start-command.sh
}

# systemd would end what belongs to a service when its first process ends.
stay() {
    while :; do
        $bb sleep 2147483647 &
        wait
    done
}
