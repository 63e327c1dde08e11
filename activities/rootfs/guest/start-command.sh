# Runs the start command to its end and tells its exit code. Its output goes into two pipes, which
# its user may open again by /dev/stdout and /dev/stderr.
set -u
t=/.template
bb=$t/busybox
state=$t/run

exec </dev/null >$state/out 2>$state/err
$bb sh $t/run.sh start
code=$?
exec >/dev/null 2>&1
echo $code >$state/ended
