# Does a COPY in the image, whose root directory is this script's: unpacks the tar on standard input
# beside the disk and puts what the source means where the destination says, as Docker does. Links in
# the destination are followed within the image. What it refuses it says as its last line.
set -u
t=/.template
bb=$t/busybox
files=$t/files/all
one=$t/files/one

fail() {
    echo "$1" >&2
    exit 3
}

tar() {
    $t/tools/ld.so --library-path $t/tools $t/tools/tar --numeric-owner --xattrs \
        '--xattrs-include=*' "$@"
}

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

# The name alone means the group of the same account.
find_owner() {
    uid=0 gid=0
    spec=$($bb cat $t/copy.owner)
    user=${spec%%:*} group=
    case $spec in
        *:*) group=${spec#*:} ;;
    esac
    if is_number "$user"; then
        uid=$user gid=$user
    elif [ -n "$user" ]; then
        found=$(find_account /etc/passwd "$user")
        [ -n "$found" ] || fail "as $spec: /etc/passwd of the image has no $user"
        uid=${found% *} gid=${found#* }
    fi
    if is_number "$group"; then
        gid=$group
    elif [ -n "$group" ]; then
        found=$(find_account /etc/group "$group")
        [ -n "$found" ] || fail "as $spec: /etc/group of the image has no $group"
        gid=${found% *}
    fi
}

extract() {
    tar --extract -C $files --delay-directory-restore -f - 2>$t/tar.said
}

unpack() {
    $bb mkdir -p $files $one
    set -o pipefail
    if [ -e $t/copy.gzip ]; then $bb zcat | extract; else extract; fi ||
        fail "the files cannot be unpacked: $($bb head -n 1 $t/tar.said)"
}

plain_source() {
    source=$($bb cat $t/copy.source)
    source=${source#/}
    while case $source in ./*) ;; *) false ;; esac; do source=${source#./}; done
    source=${source%/}
    case /$source/ in
        */../*) fail "$source is outside of the files" ;;
        //) source=. ;;
    esac
}

# What was extracted is put in its place; what is there already keeps its owner and mode.
place() { # directory to take all from, directory to put it into
    $bb mkdir -p -- "$2" || fail "$2 is not a directory in the image"
    tar --create --format=posix --sparse -C "$1" --owner=":$uid" --group=":$gid" -f - . |
        tar --extract -C "$2" --preserve-permissions --same-owner --no-overwrite-dir \
            --keep-directory-symlink -f - 2>$t/tar.said ||
        fail "the files cannot be put into $2: $($bb head -n 1 $t/tar.said)"
}

apply_mode() { # tree
    mode=$($bb cat $t/copy.mode)
    [ -z "$mode" ] || $bb find "$1" ! -type l -exec $bb chmod "$mode" {} +
}

copy_root() { # what of the files
    if [ -d "$1" ] && [ ! -L "$1" ]; then
        apply_mode "$1"
        place "$1" "$destination"
    else
        copy_one "$1"
    fi
}

copy_one() { # what of the files
    target=$destination
    if [ "$into" ] || [ -d "$destination" ]; then target=$destination/${1##*/}; fi
    if [ -L "$target" ]; then target=$($bb readlink -f "$target"); fi
    [ ! -d "$target" ] || fail "$target is a directory in the image"
    $bb rm -rf $one
    $bb mkdir -p $one
    $bb mv -- "$1" "$one/${target##*/}"
    apply_mode $one
    place $one "${target%/*}/"
}

find_owner
unpack
plain_source
destination=$($bb cat $t/copy.destination; echo .)
destination=${destination%.}
into=
case $destination in
    */) into=yes ;;
esac
cd $files
IFS=
if [ -e "$source" ] || [ -L "$source" ]; then
    set -- "$source"
else
    set -- $source
fi
[ -e "$1" ] || [ -L "$1" ] || fail "$source: no such file"
[ $# = 1 ] || into=yes
for root in "$@"; do copy_root "$root"; done
