#!/bin/sh
# The guest's first process: mounts what a host has, lays a writable layer over the shared root, runs the one command
# inside, and reports its exit status through the virtio port `status`.
export PATH=/bin
. /settings

die() { echo "init: $*" > /dev/console; reboot -f; }

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /dev/net
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
[ -e /dev/net/tun ] || mknod /dev/net/tun c 10 200
[ -e /dev/loop-control ] || mknod /dev/loop-control c 10 237
for module in virtio_mmio virtio_console virtiofs overlay $modules; do modprobe -q "$module"; done

# A pure v2 hierarchy with every controller, as on a current distribution.
mount -t cgroup2 cgroup2 /sys/fs/cgroup || die "no cgroup v2"
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
    echo "+$controller" > /sys/fs/cgroup/cgroup.subtree_control
done
mount -t bpf bpf /sys/fs/bpf || die "no bpf filesystem"
ip link set lo up

port() {
    for dir in /sys/class/virtio-ports/*; do
        if [ "$(cat "$dir/name")" = "$1" ]; then echo "/dev/${dir##*/}"; fi
    done
}
tries=0
until out=$(port out); status=$(port status); [ -n "$out" ] && [ -n "$status" ]; do
    tries=$((tries + 1)); [ $tries -lt 100 ] || die "no virtio ports"
    sleep 0.05
done

mount -t virtiofs -o ro root /lower || die "cannot mount the shared root"
mount -t tmpfs over /over && mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/lower,upperdir=/over/upper,workdir=/over/work top /top || die "no overlay"
for dir in proc sys dev; do mkdir -p "/top/$dir"; mount --rbind "/$dir" "/top/$dir"; done
mkdir -p /top/run /top/lib/modules
# Overlays cannot lie on overlays: what tests write must be able to carry one.
mount -t tmpfs -o mode=755 run /top/run
mkdir -p -m 1777 /top/run/tmp /top/run/lock
mkdir -p /top/run/netns /top/run/home
mount --bind /lib/modules /top/lib/modules
if [ -n "$write" ]; then
    mkdir -p "/top$write"
    mount -t virtiofs write "/top$write" || die "cannot mount the shared directory"
fi
cp /command /top/run/command
cd /top && mount --move . / || die "cannot move the root"
env -i HOME=/run/home TMPDIR=/run/tmp TERM=dumb PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    CWD="$cwd" chroot . /bin/bash -c 'cd "$CWD" && . /run/command' > "$out" 2>&1 < /dev/null
echo $? > "$status"
reboot -f
