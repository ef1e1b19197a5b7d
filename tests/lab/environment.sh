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
