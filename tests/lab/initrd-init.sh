#!/bin/busybox sh
# The lab host's first program: loads the disk's driver, mounts the disk, hands over to its init.
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
while read -r module; do
  /bin/busybox insmod "$module" || echo "lab: cannot load $module"
done </modules/load
tries=0
until [ -b /dev/vda ]; do
  tries=$((tries + 1))
  [ "$tries" -gt 300 ] && echo "lab: no disk" && /bin/busybox poweroff -f
  /bin/busybox sleep 0.1
done
/bin/busybox mount -t ext4 -o noatime /dev/vda /newroot || /bin/busybox poweroff -f
/bin/busybox umount /proc /sys
exec /bin/busybox switch_root /newroot /bin/busybox init
