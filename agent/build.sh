#!/bin/sh
# Compiles emberd, a static program: build.sh OUTPUT [VERSION]. GO names the Go to use.
set -eu
output=$(realpath -m "$1")
cd "$(dirname "$0")"
# checklinkname: the agent sets one variable of the runtime; see cmd/emberd/collect.go.
flags="-s -w -checklinkname=0${2:+ -X main.version=$2}"
CGO_ENABLED=0 exec "${GO:-go}" build -trimpath -ldflags "$flags" -o "$output" ./cmd/emberd
