# Looks at the image whose root directory is this script's, before any of its programs run, as
# `activities/rootfs/image_look.py` does on a host. Says what it finds in lines `@tm@ <key> <value>`,
# and what it refuses as its last line. Changes nothing.
set -u
t=/.template
bb=$t/busybox

say() { # key, value
    printf '@tm@ %s %s\n' "$1" "$2"
}

fail() {
    echo "$1" >&2
    exit 3
}

is_number() {
    case $1 in
        '' | *[!0-9]*) return 1 ;;
    esac
}

# Read as Docker reads them (runc's libcontainer/user, GetExecUser): the first entry counts.
find_account() { # name or number
    [ -f /etc/passwd ] || return 0
    while IFS=: read -r name _ entry_uid entry_gid _ entry_home _ || [ -n "$name" ]; do
        if [ "$name" = "$1" ] || [ "$entry_uid" = "$1" ]; then
            account=$name uid=$entry_uid gid=$entry_gid home=$entry_home
            return 0
        fi
    done </etc/passwd
}

find_group() { # name or number
    [ -f /etc/group ] || return 0
    while IFS=: read -r name _ entry_gid _ || [ -n "$name" ]; do
        if [ "$name" = "$1" ] || [ "$entry_gid" = "$1" ]; then
            found_gid=$entry_gid
            return 0
        fi
    done </etc/group
}

groups_of_account() {
    [ -n "$account" ] && [ -f /etc/group ] || return 0
    while IFS=: read -r _ _ entry_gid members || [ -n "$members" ]; do
        case ,$members, in
            *,"$account",*) groups=$groups,$entry_gid ;;
        esac
    done </etc/group
}

resolve_user() {
    spec=$($bb cat $t/image.user)
    wanted=${spec%%:*}
    wanted_group=
    case $spec in
        *:*) wanted_group=${spec#*:} ;;
    esac
    account= uid= gid=0 home=/ groups=
    find_account "${wanted:-0}"
    if [ -z "$uid" ]; then
        is_number "${wanted:-0}" || fail "USER $spec: /etc/passwd of the image has no user $wanted"
        uid=${wanted:-0}
    fi
    if [ -n "$wanted_group" ]; then
        resolve_group
    else
        groups_of_account
    fi
    groups=${groups#,}
    say user "$uid $gid ${groups:--} $account"
    say home "${home:-/}"
}

resolve_group() {
    found_gid=
    find_group "$wanted_group"
    if [ -z "$found_gid" ]; then
        is_number "$wanted_group" ||
            fail "USER $spec: /etc/group of the image has no group $wanted_group"
        found_gid=$wanted_group
    fi
    gid=$found_gid
}

check_workdir() {
    workdir=$($bb cat $t/workdir)
    [ -d "$workdir" ] || [ ! -e "$workdir" ] ||
        fail "WORKDIR $workdir is not a directory in the image"
}

find_init() {
    for path in /usr/lib/systemd/systemd /lib/systemd/systemd; do
        if [ -x $path ]; then
            say init "systemd $path"
            return
        fi
    done
    path=/sbin/init
    if [ -x $path ] && [ ! -d $path ]; then
        if is_an_init $path; then
            say init "other $path"
            return
        fi
        echo "$path is no init that we know ($($bb readlink -f $path)): ours is used"
    fi
    say init added
}

# What is linked or copied to /sbin/init may be anything, such as tini: it ends with what it runs,
# and the kernel panics when the first process does. busybox and sysvinit live by their inittab.
is_an_init() {
    real=$($bb readlink -f "$1")
    case ${real##*/} in
        busybox | init) [ -e /etc/inittab ] ;;
        openrc-init | runit-init | runit | finit | dinit) ;;
        *) return 1 ;;
    esac
}

resolve_user
check_workdir
find_init
if [ -x /bin/sh ]; then say shell /bin/sh; fi
