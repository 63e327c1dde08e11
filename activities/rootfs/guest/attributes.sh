# Keeps owner and mode of what the image has and systemd-tmpfiles is to change, and restores them.
# Argument: keep or restore.
set -u
bb=/.template/busybox
kept=/.template/run/attributes

# A path may be a pattern; one with a specifier (%b) is of a boot, and none of the image's.
keep() {
    for rules in /usr/lib/tmpfiles.d/*.conf /lib/tmpfiles.d/*.conf /usr/local/lib/tmpfiles.d/*.conf \
        /etc/tmpfiles.d/*.conf /run/tmpfiles.d/*.conf; do
        [ ! -f "$rules" ] || while read -r type path _; do
            case $type,$path in
                [\#]* | *,*%* | *,) continue ;;
            esac
            IFS=
            for path in $path; do
                keep_of "$path"
            done
            IFS=$blanks
        done <"$rules"
    done
}

keep_of() { # path
    [ -e "$1" ] && [ ! -L "$1" ] || return 0
    $bb stat -c '%a %u:%g' -- "$1"
    printf '%s\0' "$1"
}

restore() {
    while read -r mode owner && IFS= read -r -d '' path; do
        [ -e "$path" ] && [ ! -L "$path" ] || continue
        now=$($bb stat -c '%a %u:%g' -- "$path")
        [ "$now" != "$mode $owner" ] || continue
        $bb chown "$owner" -- "$path"
        $bb chmod "$mode" -- "$path"
    done
}

blanks=$IFS
case $1 in
    keep) keep >$kept ;;
    restore) restore <$kept ;;
esac
