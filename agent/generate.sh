#!/bin/sh
# Regenerates gen/ from ../proto. Needs protoc, protoc-gen-go and protoc-gen-connect-go.
set -eu
cd "$(dirname "$0")"
protoc -I ../proto \
  --go_out=gen --go_opt=paths=source_relative \
  --connect-go_out=gen --connect-go_opt=paths=source_relative \
  process/process.proto filesystem/filesystem.proto
