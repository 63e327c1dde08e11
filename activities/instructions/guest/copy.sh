# Does a COPY or an ADD in the image, whose root directory is this script's: unpacks the tar of its
# files beside the disk and puts what the source means where the destination says, as Docker does, or
# E2B. Links in the destination are followed within the image. What it refuses it says as its last line.
set -u -o pipefail
t=/.template
bb=$t/busybox
files=$t/files/all
one=$t/files/one
. $t/accounts.sh

fail() {
    echo "$1" >&2
    exit 3
}

tar() {
    $t/tools/ld.so --library-path $t/tools $t/tools/tar --numeric-owner --xattrs \
        '--xattrs-include=*' "$@"
}

# Says what is in a file, which may be compressed as Docker knows it.
plain() { # file
    case $($bb head -c 6 "$1" | $bb hexdump -v -e '1/1 "%02x"') in
        1f8b*) $bb zcat <"$1" ;;
        425a68*) $bb bzcat <"$1" ;;
        fd377a585a00) $bb xzcat <"$1" ;;
        *) $bb cat "$1" ;;
    esac
}

unpack() { # file, directory
    $bb mkdir -p "$2"
    plain "$1" 2>$t/plain.said |
        tar --extract -C "$2" --delay-directory-restore -f - 2>$t/tar.said ||
        fail "the files cannot be unpacked: $($bb cat $t/plain.said $t/tar.said | $bb head -n 1)"
}

is_archive() { # file
    [ -n "$(plain "$1" 2>$t/plain.said | tar --list -f - 2>$t/tar.said | $bb head -n 1)" ]
}

plain_source() {
    source=$($bb cat $t/copy.source)
    source=${source#/}
    while case $source in ./*) ;; *) false ;; esac; do source=${source#./}; done
    source=${source%/}
    [ ! -e $t/copy.by-e2b ] || fixed_source
    case /$source/ in
        */../*) fail "$source is outside of the files" ;;
        //) source=. ;;
    esac
}

# E2B's clients send what a pattern matches and nothing else: all that is below the directory before
# it keeps its place there.
fixed_source() {
    [ ! -e "$files/$source" ] || return 0
    case $source in
        *[*?[{\\]*) ;;
        *) return 0 ;;
    esac
    source=/${source%%[*?[{\\]*}
    source=${source%/*}
    source=${source#/}
}

# What was extracted is put in its place; what is there already keeps its owner and mode.
place() { # directory to take all from, directory to put it into
    $bb mkdir -p -- "$2" || fail "$2 is not a directory in the image"
    pack "$1" |
        tar --extract -C "$2" --preserve-permissions --same-owner --no-overwrite-dir \
            --keep-directory-symlink -f - 2>$t/tar.said ||
        fail "the files cannot be put into $2: $($bb head -n 1 $t/tar.said)"
}

pack() { # directory
    if [ "$keeps_owners" ]; then
        tar --create --format=posix --sparse -C "$1" -f - .
    else
        tar --create --format=posix --sparse -C "$1" --owner=":$uid" --group=":$gid" -f - .
    fi
}

apply_mode() { # tree
    mode=$($bb cat $t/copy.mode)
    [ -z "$mode" ] || $bb find "$1" ! -type l -exec $bb chmod "$mode" {} +
}

copy_root() { # what of the files
    if [ -d "$1" ] && [ ! -L "$1" ]; then
        apply_mode "$1"
        place "$1" "$destination"
    elif [ -e $t/copy.unpacks ] && [ -f "$1" ] && [ ! -L "$1" ] && is_archive "$1"; then
        copy_archive "$1"
    else
        copy_one "$1"
    fi
}

# Whose its files are, the archive says, unless the step does.
copy_archive() { # what of the files
    $bb rm -rf $one
    unpack "$1" $one
    apply_mode $one
    [ -s $t/copy.owner ] || keeps_owners=yes
    place $one "$destination"
    keeps_owners=
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

meaning=docker
[ ! -e $t/copy.by-e2b ] || meaning=e2b
keeps_owners=
find_owner "$($bb cat $t/copy.owner)" $meaning
unpack $t/files.tar $files
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
