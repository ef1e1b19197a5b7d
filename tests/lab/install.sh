#!/bin/sh
# Runs in a chroot of the image: installs the working tree in /opt/emberbox the way a user does.
set -eu
cd /opt/emberbox
if [ -f Makefile ] && grep -q '^install:' Makefile; then
  make install
else
  echo "no 'install' target yet: only the tree is there"
fi
