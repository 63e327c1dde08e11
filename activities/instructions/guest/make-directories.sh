# Makes working directories in the image, whose root directory is this script's: those in the files
# workdir.1, workdir.2, … in their order. What it refuses it says as its last line.
t=/.template
bb=$t/busybox
number=1
while [ -e $t/workdir.$number ]; do
    workdir=$($bb cat $t/workdir.$number)
    if [ ! -d "$workdir" ] && ! $bb mkdir -p -- "$workdir" 2>/dev/null; then
        echo "WORKDIR $workdir cannot be made in the image" >&2
        exit 3
    fi
    $bb rm $t/workdir.$number
    number=$((number + 1))
done
