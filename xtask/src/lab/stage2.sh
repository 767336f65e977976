# Second stage of L1 and its process 1: runs the command with its streams on virtio ports, tells
# its exit status, and keeps reaping orphans meanwhile.
exec </dev/null >/dev/console 2>&1
bb=/run/lab/busybox
for name in /sys/class/virtio-ports/*/name; do
    port=/dev/$($bb basename "$($bb dirname "$name")")
    case "$($bb cat "$name")" in
    bh.out) out=$port ;;
    bh.err) err=$port ;;
    bh.control) control=$port ;;
    esac
done
exec 9<>"$control"
echo up >&9
# Beats of the other side's heart: each is an interrupt, and that is all they are for.
$bb cat <&9 >/dev/null 2>&1 9>&- &
if [ -n "$LAB_TTY" ]; then
    $bb setsid -c /bin/sh /run/lab/cmd <>/dev/hvc0 >&0 2>&1 9>&- &
elif [ -n "$LAB_STDIN" ]; then
    $bb setsid /bin/sh /run/lab/cmd <>"$out" >&0 2>"$err" 9>&- &
else
    $bb setsid /bin/sh /run/lab/cmd </dev/null >"$out" 2>"$err" 9>&- &
fi
wait $!
code=$?
[ -e /run/lab/emulator-fault ] && echo "fault $($bb head -c 300 /run/lab/emulator-fault)" >&9
$bb sync
echo "exit $code" >&9
# The other side ends the emulator as soon as it has read this.
$bb sleep 5
$bb poweroff -f
