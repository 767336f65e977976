#!/bin/busybox sh
# First process of L1: modules, root file system, then the second stage in the new root.
# The host's root is read-only underneath; what L1 writes is lost with it. Only the working tree
# is writable through.
/bin/busybox mkdir -p /proc /sys /dev /host /over /new
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
. /lab/env

die() {
    echo "lab: $*" >/dev/kmsg
    poweroff -f
}

while read -r module; do
    insmod "/lab/modules/$module.ko" || echo "lab: cannot load $module" >/dev/kmsg
done </lab/modules/order

opts=trans=virtio,version=9p2000.L,msize=512000,access=any
mount -t 9p -o "ro,cache=loose,$opts" root /host || die "cannot mount the host's root"
mount -t tmpfs -o mode=0755 over /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work root /new ||
    die "cannot lay a writable root over the host's"
for dir in proc sys dev run tmp; do
    [ -d "/new/$dir" ] || mkdir "/new/$dir"
done
mount --move /proc /new/proc
mount --move /sys /new/sys
mount --move /dev /new/dev
mount -t tmpfs -o mode=0755 run /new/run
mount -t tmpfs -o mode=1777 tmp /new/tmp
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts -o gid=5,mode=620 devpts /new/dev/pts
mount -t tmpfs -o mode=1777 shm /new/dev/shm
mount -t cgroup2 cgroup2 /new/sys/fs/cgroup
mount -t debugfs debugfs /new/sys/kernel/debug
mkdir -p "/new$LAB_TREE"
mount -t 9p -o "rw,cache=mmap,$opts" tree "/new$LAB_TREE" || die "cannot mount the working tree"
if [ -n "$LAB_TARGET" ]; then
    mkdir -p "/new$LAB_TARGET"
    mount -t 9p -o "rw,cache=mmap,$opts" target "/new$LAB_TARGET" || die "cannot mount target"
fi
ln -sfn /proc/self/fd /dev/fd 2>/dev/null
for link in fd:/proc/self/fd stdin:/proc/self/fd/0 stdout:/proc/self/fd/1 stderr:/proc/self/fd/2; do
    ln -sfn "${link#*:}" "/new/dev/${link%%:*}"
done
mkdir -p /new/lib/modules /new/run/lab
ln -sfn "$LAB_MODULES" "/new/lib/modules/$(uname -r)"
cp /bin/busybox /lab/stage2 /lab/env /lab/cmd /new/run/lab/
ifconfig lo 127.0.0.1 up
hostname bulkhead-l1
exec switch_root /new /run/lab/busybox sh /run/lab/stage2
