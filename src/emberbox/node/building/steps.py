"""Doing one step in a build's machine."""

from __future__ import annotations

import asyncio
import os
import stat
from collections import deque
from pathlib import Path

from emberbox.node.building.journal import Journal
from emberbox.node.building.machine import BuildMachine, Finished, OutputLine
from emberbox.node.building.model import StepFailed, StepType
from emberbox.node.building.plan import Work

_STAGE = "/var/tmp/.emberbox-copy"
_COPY_SECONDS = 1800.0
_TAIL_LINES = 5
_KILLED = 128 + 9
"""How a shell says that its program was killed."""
_SETTLE_LINES = 500

_MAKE_FOLDERS = r"""
make_folders() { # FOLDER OWNER: makes what is missing of it, owned by OWNER
  local folder=$1 missing=()
  while [ ! -d "$folder" ]; do
    if [ -e "$folder" ] || [ -L "$folder" ]; then echo "'$folder' is there and is not a folder" >&2; exit 1; fi
    missing=("$folder" "${missing[@]}")
    folder=$(dirname -- "$folder")
  done
  for folder in "${missing[@]}"; do
    mkdir -- "$folder"
    chown "$2" -- "$folder"
  done
}
"""

_OWNER = r"""
check_owner() { # USER[:GROUP]
  chown "$1" -- "$2" 2>/dev/null && return
  echo "there is no user or group '$1' in the image; create it with a RUN step first" >&2
  exit 1
}
"""

_COPY = (
    "set -eu\nPATH=$PATH:/usr/sbin:/usr/bin:/sbin:/bin\n"
    + _MAKE_FOLDERS
    + _OWNER
    + r"""
stage=$1 pattern=$2 target=$3 owner=$4 mode=$5
command -v tar >/dev/null || { echo "the image has no 'tar', which COPY needs" >&2; exit 1; }
mkdir -- "$stage/files"
check_owner "$owner" "$stage/files"
case $owner in *:*) ;; *) owner=$owner:$(id -gn -- "$owner" 2>/dev/null || echo "$owner") ;; esac
said=$(tar -xof "$stage/archive" -C "$stage/files" 2>&1) || {
  free=$(stat -f -c %a "$stage" 2>/dev/null || echo 1000)
  if [ "$free" -lt 16 ]; then said="No space left on the machine's disk; ask for a larger one"; fi
  echo "the uploaded files could not be unpacked: $(printf '%s' "$said" | tail -n 2)" >&2
  exit 1
}
rm -f -- "$stage/archive"
cd -- "$stage/files"
chown -hR "$owner" .
[ -z "$mode" ] || chmod -R "$mode" .

shopt -s globstar dotglob nullglob
found=()
collect() { # keeps what lies under a folder that is copied anyway out of the list
  local path kept
  for path in "$@"; do
    path=${path%/}
    [ -e "$path" ] || [ -L "$path" ] || continue
    for kept in "${found[@]}"; do
      case $path in "$kept"/*) continue 2 ;; esac
    done
    found+=("$path")
  done
}
old=$IFS IFS=
collect $pattern
IFS=$old
if [ ${#found[@]} = 0 ]; then
  # A pattern that the client's glob knows and this one does not, such as {a,b}. The archive holds its matches alone.
  folder=${pattern%%[*?\[\{(]*}
  case $folder in */*) folder=${folder%/*} ;; *) folder=. ;; esac
  [ ! -d "$folder" ] || collect "$folder"/*
fi
[ ${#found[@]} != 0 ] || { echo "nothing in the uploaded files matches '$pattern'" >&2; exit 1; }

into() { # copies FROM (a folder's content, or a file) TO without another copy of the bytes where that can be
  cp -alf -- "$1" "$2" 2>/dev/null || cp -af -- "$1" "$2"
}
several=
[ ${#found[@]} = 1 ] || several=1
for path in "${found[@]}"; do
  if [ -d "$path" ] && [ ! -L "$path" ]; then
    make_folders "${target%/}" "$owner"
    into "$path/." "$target"
  elif [ -n "$several" ] || [ "${target%/}" != "$target" ] || [ -d "$target" ]; then
    make_folders "${target%/}" "$owner"
    into "$path" "${target%/}/${path##*/}"
  else
    make_folders "$(dirname -- "$target")" "$owner"
    into "$path" "$target"
  fi
done
"""
)

_WORKDIR = "set -eu\n" + _MAKE_FOLDERS + 'make_folders "$1" "$2"\n'

_USER = r"""
id -u -- "$1" >/dev/null 2>&1 ||
  { echo "there is no user '$1' in the image; create it with a RUN step first" >&2; exit 1; }
"""

# A login shell begins with the PATH of /etc/profile, which knows nothing of the template's.
_PATH = r"""
set -eu
mkdir -p /etc/profile.d
printf '# The PATH of the template.\nexport PATH=%q\n' "$1" >/etc/profile.d/zz-template-path.sh
chmod 644 /etc/profile.d/zz-template-path.sh
"""


async def do(work: Work, machine: BuildMachine, files_dir: str, seconds: float, journal: Journal) -> bool:
    """Do a step. Returns whether files may have changed.

    Raises:
        StepFailed: says what went wrong, in words for the one who wrote the step.
    """
    match work.step.type:
        case StepType.RUN:
            await _run(work, machine, seconds, journal)
            return True
        case StepType.COPY:
            await _copy(work, machine, files_dir)
            return True
        case StepType.WORKDIR:
            path, user = work.words
            await machine.do(_WORKDIR, path, user)
            return True
        case StepType.USER:
            await machine.do(_USER, work.words[0])
            return False
        case StepType.ENV:
            await machine.do(_PATH, work.words[1])
            return True
        case StepType.ARG:
            return False


async def _run(work: Work, machine: BuildMachine, seconds: float, journal: Journal) -> None:
    command, user = work.words
    last: deque[str] = deque(maxlen=_TAIL_LINES)
    env = work.before.variables
    async for event in machine.run(command, user=user, workdir=work.before.workdir, env=env, seconds=seconds):
        if isinstance(event, OutputLine):
            last.append(event.text)
            journal.log(event.text, "warn" if event.error else "info")
            if journal.next % _SETTLE_LINES == 0:
                await journal.settle()
        else:
            await _check_end(event, command, last, machine)


async def _check_end(event: Finished, command: str, last: deque[str], machine: BuildMachine) -> None:
    if event.exit_code == 0:
        return
    shown = command if len(command) <= 300 else command[:300] + "..."
    how = f"ended with exit code {event.exit_code}" if event.exit_code > 0 else f"was ended ({event.status})"
    if event.exit_code in (-1, _KILLED) and await machine.ran_out_of_memory():
        how += f": the machine ran out of its {machine.memory_mb} MiB of memory"
    tail = "\n".join(last)
    raise StepFailed(f"the command '{shown}' {how}" + (f":\n{tail}" if tail else ""))


async def _copy(work: Work, machine: BuildMachine, files_dir: str) -> None:
    pattern, target, owner, mode = work.words
    archive, size = await asyncio.to_thread(_open_archive, files_dir, work.step.files_hash)
    try:
        stage = f"{_STAGE}-{work.key[:16]}"
        await machine.do('rm -rf -- "$1" && mkdir -p -m 700 -- "$1"', stage)
        try:
            await machine.upload(archive, size, f"{stage}/archive")
            await machine.do(_COPY, stage, pattern, target, owner, mode, seconds=_COPY_SECONDS)
        finally:
            await machine.do('rm -rf -- "$1"', stage)
    finally:
        os.close(archive)


def _open_archive(files_dir: str, files_hash: str) -> tuple[int, int]:
    """Open an uploaded archive. The folder is an unprivileged process's, so nothing in it is followed."""
    path = Path(files_dir) / f"{files_hash}.tar.gz"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise StepFailed(f"the files to copy (hash {files_hash[:12]}) were not uploaded; build again") from None
    except OSError as error:
        raise StepFailed(f"the uploaded files (hash {files_hash[:12]}) cannot be read: {error.strerror}") from error
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise StepFailed(f"the uploaded files (hash {files_hash[:12]}) are not a regular file")
    return descriptor, facts.st_size
