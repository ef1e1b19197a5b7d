#!/bin/busybox sh
# A guest's first program for the lab while emberd has none of its own for microVMs: it joins the disks, sets up the
# network and hands over to emberd. It follows the contract in runtime/firecracker/guest.py.
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
$bb mount -t devtmpfs dev /dev
while read -r module; do $bb insmod "$module"; done </modules/load

for word in $($bb cat /proc/cmdline); do
  case "$word" in
    emberd.*) key=${word%%=*}; eval "${key#emberd.}='${word#*=}'" ;;
  esac
done

$bb mkdir -p /disks
disks=$($bb ls /dev | $bb grep '^vd' | $bb sort)
lower= number=0
for disk in $disks; do
  number=$((number + 1))
  $bb mkdir -p /disks/$number
  if [ "$number" -le "$layers" ]; then
    $bb mount -t erofs -o ro /dev/$disk /disks/$number || $bb mount -t ext4 -o ro /dev/$disk /disks/$number
    lower="/disks/$number${lower:+:$lower}"
  else
    $bb mount -t ext4 /dev/$disk /disks/$number
    $bb mkdir -p /disks/$number/u /disks/$number/w
    $bb mount -t overlay -o "lowerdir=$lower,upperdir=/disks/$number/u,workdir=/disks/$number/w" overlay /newroot
  fi
done

$bb ip link set lo up
$bb ip addr add "$address" dev eth0
$bb ip link set eth0 up
$bb ip route add default via "$gateway"
$bb hostname "$hostname"
echo "nameserver $dns" >/newroot/etc/resolv.conf

root=/newroot
$bb mkdir -p $root/proc $root/sys $root/dev $root/run $root/tmp
$bb mount -t proc proc $root/proc
$bb mount -t sysfs sys $root/sys
$bb mount -t devtmpfs dev $root/dev
$bb mkdir -p $root/dev/pts $root/dev/shm
$bb mount -t devpts -o mode=620,gid=5,ptmxmode=666 devpts $root/dev/pts
$bb mount -t tmpfs -o mode=1777 shm $root/dev/shm
$bb mount -t tmpfs -o mode=755 run $root/run
$bb mount -t cgroup2 cgroup2 $root/sys/fs/cgroup
$bb cp /emberd $root/run/emberd
$bb umount /proc /sys
export EMBERD_CONTROL_HASH="$control_hash"
exec $bb switch_root $root /run/emberd
