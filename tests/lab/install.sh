#!/bin/sh
# Runs in a chroot of the image: installs the working tree in /opt/emberbox the way a user does, and what tests need.
set -eu
cd /opt/emberbox
make install
tools/install.sh venv dev
.venv/bin/python tests/lab/prepare.py
