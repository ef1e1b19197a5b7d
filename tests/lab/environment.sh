# Sourced in the lab before Emberbox is started, and when its base template is made: where it answers, that its processor
# is slow, and that guests reach package registries the way this machine does.
export EMBERBOX_RUNTIME=firecracker
export EMBERBOX_API_HOST=0.0.0.0
export EMBERBOX_EDGE_HOST=0.0.0.0
export EMBERBOX_TIME_SCALE=15
export EMBERBOX_LOG_LEVEL=debug
export EMBERBOX_DEFAULT_MEMORY_MB=256
export EMBERBOX_DEFAULT_CPU_COUNT=1
export EMBERBOX_DEFAULT_DISK_SIZE_MB=1024
export EMBERBOX_WARM_MAX=2
export EMBERBOX_INSTANCE_NAME=eblab
export EMBERBOX_INHERIT_HOST_NETWORK=true
cd /opt/emberbox
# Machines are in this group's groups, which `emberbox down` removes. Each on one processor, away from everything else,
# for the reason in ADR 22.
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
  mkdir -p "/sys/fs/cgroup/$EMBERBOX_INSTANCE_NAME"
  [ "$(nproc --all)" = 1 ] || echo 1 >"/sys/fs/cgroup/$EMBERBOX_INSTANCE_NAME/cpuset.cpus" || true
fi
