#!/bin/sh
# The server, started again when code of the sandbox ends it.
export JUPYTER_PATH=/opt/interpreter/share
export PATH="/opt/interpreter/venv/bin:$PATH"
cd "$HOME" || exit 1
while true; do
  /opt/interpreter/venv/bin/python -P -m interpreter
  sleep 1
done
