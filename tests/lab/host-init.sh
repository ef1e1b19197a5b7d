#!/bin/sh
# Brings the lab host up: file systems, network, KVM, the key that `lab.py` made for this boot.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
ln -sf /proc/self/fd /dev/fd
for number in 0:stdin 1:stdout 2:stderr; do ln -sf /proc/self/fd/${number%:*} /dev/${number#*:}; done
mount -t devpts -o mode=620,gid=5,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /run/lab /run/sshd /run/netns /run/lock

hostname emberbox-lab
ip link set lo up
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
ip route add default via 10.0.2.2
echo "nameserver 10.0.2.3" >/etc/resolv.conf
sysctl -q -w net.ipv4.ip_forward=1

for word in $(cat /proc/cmdline); do
  case "$word" in
    lab.key=*) echo "ssh-ed25519 ${word#lab.key=}" >/run/lab/authorized_keys ;;
  esac
done

echo +cpuset >/sys/fs/cgroup/cgroup.subtree_control

modprobe kvm-amd nested=0 vgif=0 vls=0 avic=0 || modprobe kvm-intel || echo "lab: no KVM module loads"
# A virtual machine that does nothing and never ends: see ADR 22.
hold='import fcntl, os, time; vm = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE01); time.sleep(1e9)'
[ ! -e /dev/kvm ] || setsid python3 -c "$hold" </dev/null >/dev/null 2>&1 &
echo "lab: host is up"
