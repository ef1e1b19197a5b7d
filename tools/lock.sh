#!/usr/bin/env bash
# Resolves pyproject.toml into the hashed requirements files. Run after every change of a dependency.
# `--upgrade` (passed on to uv) also moves what is already pinned.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
compile() { # FILE ARGUMENT...
  local file=$1
  shift
  "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-emit-find-links --no-header "${more[@]}" pyproject.toml "$@" -o "$file"
}
more=("$@")
compile requirements.txt
compile requirements-dev.txt --group dev
# A group alone, without the project's own dependencies.
for group in build go node; do
  "$uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
    --no-emit-index-url --no-emit-find-links --no-header "${more[@]}" --group "$group" -o "requirements-$group.txt"
done
