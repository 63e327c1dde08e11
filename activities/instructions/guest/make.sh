# Makes what is to be in the image, whose root directory is this script's: users and directories, as
# the files make.1.*, make.2.*, … say in their order. What it refuses it says as its last line. There are no
# devices here: not even /dev/null, which the image may have as a file, or not at all.
set -u
t=/.template
bb=$t/busybox
. $t/accounts.sh

fail() {
    echo "$1" >&2
    exit 3
}

# It and those above it that are not there belong to its owner.
make_directory() { # path, owner
    [ ! -d "$1" ] || return 0
    find_owner "$2" docker
    first=${1%/}
    while above=${first%/*} && [ -n "$above" ] && [ ! -d "$above" ]; do first=$above; done
    $bb mkdir -p -- "$1" 2>$t/said || fail "WORKDIR $1 cannot be made in the image"
    $bb chown -R "$uid:$gid" "$first"
}

make_user() { # spec
    user=${1%%:*}
    if [ -e "$at.may-be-made" ] && is_plain "$user" && [ -z "$(find_account /etc/passwd "$user")" ]; then
        add_user "$user"
    fi
    [ ! -e "$at.has-sudo" ] || give_sudo "$user"
}

is_plain() { # name
    case $1 in
        '' | [!A-Za-z_]* | *[!A-Za-z0-9_.-]*) return 1 ;;
    esac
    [ ${#1} -le 32 ]
}

add_user() { # name
    $bb mkdir -p /etc
    id=$(: | $bb awk -F: '$3 >= 1000 { used[$3] } END { for (id = 1000; id in used; id++); print id }' \
        $(list_files /etc/passwd /etc/group))
    home=/home/$1
    if [ "$1" = root ]; then id=0 home=/root; fi
    found=$(find_account /etc/group "$1")
    [ -n "$found" ] || append /etc/group "$1:x:$id:"
    gid=${found:-$id}
    gid=${gid% *}
    login=/bin/sh
    [ ! -x /bin/bash ] || login=/bin/bash
    append /etc/passwd "$1:x:$id:$gid::$home:$login"
    [ ! -f /etc/shadow ] || append /etc/shadow "$1:!::0:99999:7:::"
    add_home "$home" "$id:$gid"
}

list_files() {
    for file in "$@"; do
        if [ -f "$file" ]; then echo "$file"; fi
    done
}

add_home() { # path, owner
    [ ! -e "$1" ] || return 0
    $bb mkdir -p "$1" || fail "USER ${1##*/}: $1 cannot be made in the image"
    [ ! -d /etc/skel ] || $bb cp -a /etc/skel/. "$1/"
    $bb chown -R "$2" "$1"
}

append() { # file, line
    [ ! -e "$1" ] || [ -f "$1" ] || fail "$1 of the image is no file"
    [ -z "$($bb tail -c 1 "$1" 2>$t/said)" ] || echo >>"$1"
    echo "$2" >>"$1" || fail "$1 of the image cannot be written"
}

# Where sudo is: it reads this file alone.
give_sudo() { # name or number
    [ -f /etc/sudoers ] || return 0
    name=$1
    if is_number "$name"; then name="#$name"; else is_plain "$name" || fail "USER $1 can have no sudo"; fi
    rule="$name ALL=(ALL:ALL) NOPASSWD: ALL"
    $bb grep -Fqx -e "$rule" /etc/sudoers || append /etc/sudoers "$rule"
}

number=1
while at=$t/make.$number && { [ -e $at.user ] || [ -e $at.directory ]; }; do
    if [ -e $at.user ]; then
        make_user "$($bb cat $at.user)"
    else
        make_directory "$($bb cat $at.directory)" "$($bb cat $at.owner)"
    fi
    $bb rm $at.*
    number=$((number + 1))
done
