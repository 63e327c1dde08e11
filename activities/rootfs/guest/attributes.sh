# Keeps owner and mode of what the image has and systemd-tmpfiles is to change, and where links lead
# to, and restores them.
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
    if [ -L "$1" ]; then
        printf 'link -\n%s\0' "$1"
        $bb readlink -n -- "$1"
        printf '\0'
    elif [ -e "$1" ]; then
        $bb stat -c '%a %u:%g' -- "$1"
        printf '%s\0' "$1"
    fi
}

restore() {
    while read -r mode owner && IFS= read -r -d '' path; do
        if [ "$mode" = link ]; then
            IFS= read -r -d '' target
            [ ! -L "$path" ] || [ "$($bb readlink -n -- "$path")" = "$target" ] ||
                $bb ln -sfn -- "$target" "$path"
            continue
        fi
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
