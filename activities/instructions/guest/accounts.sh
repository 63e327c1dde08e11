# Accounts of the image whose root directory is this script's; read by `.`, not run.

is_number() {
    case $1 in
        '' | *[!0-9]*) return 1 ;;
    esac
}

# The first entry counts, as Docker reads them.
find_account() { # file, name: says `<third field> <fourth field>`
    [ -f "$1" ] || return 0
    while IFS=: read -r name _ third fourth _ || [ -n "$name" ]; do
        [ "$name" = "$2" ] && echo "$third ${fourth:-0}" && return
    done <"$1"
}

# Leaves the ids of `user[:group]` in `uid` and `gid`. A user alone means its own group, or to E2B the
# group of its name.
find_owner() { # spec, whose meaning
    uid=0 gid=0
    user=${1%%:*} group=
    case $1 in
        *:*) group=${1#*:} ;;
    esac
    if is_number "$user"; then
        uid=$user gid=$user
    elif [ -n "$user" ]; then
        found=$(find_account /etc/passwd "$user")
        [ -n "$found" ] || fail "as $1: /etc/passwd of the image has no $user"
        uid=${found% *} gid=${found#* }
        [ "$2" != e2b ] || find_group_of "$user"
    fi
    if is_number "$group"; then
        gid=$group
    elif [ -n "$group" ]; then
        found=$(find_account /etc/group "$group")
        [ -n "$found" ] || fail "as $1: /etc/group of the image has no $group"
        gid=${found% *}
    fi
}

find_group_of() { # user
    found=$(find_account /etc/group "$1")
    [ -z "$found" ] || gid=${found% *}
}
