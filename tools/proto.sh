#!/usr/bin/env bash
# Generates src/emberbox/wire from proto/. The result is committed; a test checks that it is current.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${1:-src/emberbox/wire}
PATH="$(dirname "$python"):$PATH" "$python" -m grpc_tools.protoc -I proto/node -I proto/edge \
  --python_out="$out" --mypy_out="quiet:$out" --grpc_python_out="$out" --mypy_grpc_out="quiet:$out" node.proto edge.proto
# protoc writes absolute imports; ours is a package.
sed -i -E 's/^import (node|edge)_pb2( as .*)?$/from . import \1_pb2\2/' "$out"/*_pb2_grpc.py "$out"/*_pb2_grpc.pyi
