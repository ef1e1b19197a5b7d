#!/bin/sh
# Runs in a chroot of the image: installs the working tree in /opt/emberbox the way a user does, and what tests need.
# "tools" is what stays from one working tree to the next, "all" the tree itself.
set -eu
cd /opt/emberbox
case "$1" in
  tools)
    make install-system install-venv install-go
    tools/install.sh venv dev
    ;;
  all)
    make install
    tools/install.sh venv dev
    .venv/bin/python -m compileall -q src tests bench
    . /usr/lib/emberbox-lab/environment
    .venv/bin/python tests/lab/prepare.py
    ;;
esac
