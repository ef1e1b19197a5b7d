"""Boots the lab, runs tests in it and ends it: `python tests/lab/suite.py [--all] [PYTEST ARGUMENT ...]`.

Where this machine's own KVM runs guests no lab is needed: the same tests start an Emberbox with microVMs here. Those
that change their host (its clock, a full disk, a network more) are skipped, and say so.
`make test` runs the fast part, within a limit of time; `make test-lab` runs everything. Where a lab cannot be had, or
dies without Emberbox having a part in it, tests are skipped with the reason; see `limits.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from emberbox.cli import kvm  # noqa: E402
from emberbox.runtime.firecracker import guest, trial  # noqa: E402
from emberbox.runtime.firecracker.binaries import Binaries  # noqa: E402
from emberbox.runtime.firecracker.errors import FirecrackerError, GuestFilesError  # noqa: E402
from tests.lab import lab as command_line  # noqa: E402
from tests.lab import limits  # noqa: E402
from tests.lab.host import Lab, LabError  # noqa: E402
from tests.lab.recipe import InstallFailed, LabImage, RecipeError, build, say  # noqa: E402
from tests.support import firecracker as parts  # noqa: E402

CLIENTS = (
    "tests/clients/test_commands.py",
    "tests/clients/test_files.py",
    "tests/clients/test_cli.py",
    "tests/clients/test_pty.py",
    "tests/clients/test_async_client.py",
    "tests/clients/test_create.py",
    "tests/clients/test_life_cycle.py",
    "tests/clients/test_list.py",
    "tests/clients/test_errors.py",
)
FAST = ("tests/lab/test_microvm.py", "tests/lab/test_steps.py", "tests/lab/test_life.py", *CLIENTS)
ALL = ("tests/lab", "tests/clients")
TRIAL_SCALE = 0.3
"""A KVM that works boots the trial guest in less than a second; one that does not may take all the time there is."""
FAST_SECONDS = 1500.0
"""For all of it: image, boot, tests. The last test that begins may go over it."""
STATE = Path(tempfile.gettempdir()) / f"emberbox-lab-tests-{os.getuid()}"
BOOTS = 2
NO_TESTS = 5
"""What pytest says when none was selected, as in one half by `-k`."""
BOOT_SECONDS = 300.0
MEMORY_NEEDED_MB = 6144


class NotStarted(Exception):
    """Emberbox cannot be installed, or does not start although the lab works: a failure of the tests, not the lab."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="suite.py", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every test, without a limit of time")
    parser.add_argument("--cpus", type=int, default=2, help="see `lab.py up --help`")
    args, more = parser.parse_known_args()
    if (programs := _programs_for_kvm()) is not None:
        return _run_here(args, more, programs)
    os.environ["EMBERBOX_LAB_STATE"] = str(STATE)  # a lab that `make lab` started is left alone
    with STATE.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("no test runs in the lab: another run has it")
            return 0
        try:
            Lab().down()  # of a run that was killed
            return _run(args, more)
        except LabError as error:
            say(f"no test runs in the lab: {error}")
            return 0
        except NotStarted as error:
            say(str(error))
            return 1
        finally:
            Lab().down()


def _programs_for_kvm() -> Binaries | None:
    """Firecracker and its jailer, where a guest kernel really boots under this machine's KVM."""
    try:
        kvm.probe(kvm.DEADLINE_SECONDS)
        programs = parts.pair()
        with tempfile.TemporaryDirectory() as folder, parts.one_at_a_time("guest"):
            agent = Path(folder) / "emberd"
            agent.write_bytes(b"not run")
            files = guest.make_guest_files(parts.cache_dir() / "guest", agent)
        asyncio.run(trial.boot(programs.firecracker, files.kernel, time_scale=TRIAL_SCALE))
    except (kvm.KvmUnusable, FirecrackerError, subprocess.SubprocessError, OSError) as error:
        say(f"this machine's KVM runs no guests: {error}")
        return None
    return programs


def _run_here(args: argparse.Namespace, more: list[str], programs: Binaries) -> int:
    say("this machine's KVM runs guests: no lab is needed")
    here = ("tests/lab",) if args.all else tuple(path for path in FAST if path not in CLIENTS)
    beside = ("tests/integration/firecracker", "tests/clients") if args.all else CLIENTS
    left = [] if args.all else ["-m", "not slow"]
    settings = {
        "EMBERBOX_RUNTIME": "firecracker",
        "EMBERBOX_FIRECRACKER": str(programs.firecracker),
        "EMBERBOX_JAILER": str(programs.jailer),
    }
    codes = []
    # One at a time those that count what is on their host.
    for words in (["-n", "0", *here], ["-n", str(args.cpus), "--dist", "loadgroup", *beside]):
        command = [sys.executable, "-m", "pytest", *left, *words, *more]
        codes.append(subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, check=False).returncode)
    failed = [code for code in codes if code not in (0, NO_TESTS)]
    return failed[0] if failed else min(codes)


def _run(args: argparse.Namespace, more: list[str]) -> int:
    began = time.monotonic()
    _refuse_unfit_machine()
    variables = _living(_image(), args.cpus)
    left = [] if args.all else [f"--lab-seconds={FAST_SECONDS - (time.monotonic() - began):.0f}", "-m", "not slow"]
    words = ["-n", "0", "-p", "tests.lab.limits", *left, *(ALL if args.all else FAST), *more]
    command = [sys.executable, "-m", "pytest", *words]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False).returncode


def _refuse_unfit_machine() -> None:
    if platform.machine() != "x86_64":
        raise LabError(f"the lab emulates an x86-64 machine on one, and this is {platform.machine()}")
    if os.geteuid() != 0:
        raise LabError("making the lab's image needs root")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:") and int(line.split()[1]) < MEMORY_NEEDED_MB << 10:
            raise LabError(f"it needs {MEMORY_NEEDED_MB} MiB of free memory and this machine has {line.split()[1]} kB")


def _image() -> LabImage:
    """
    Raises:
        NotStarted: Emberbox cannot be installed in it.
        LabError: it cannot be made here.
    """
    try:
        return build("bookworm", install=True)
    except InstallFailed as error:
        raise NotStarted(f"Emberbox cannot be installed on a fresh system: {error}") from error
    except (RecipeError, GuestFilesError, subprocess.SubprocessError, OSError) as error:
        raise LabError(f"its image cannot be made: {error}") from error


def _living(image: LabImage, cpus: int) -> dict[str, str]:
    """Boot the lab and start Emberbox there, again when the lab dies of it; returns the variables for clients.

    Raises:
        NotStarted: Emberbox does not start in a lab that lives.
        LabError: the lab did not live, twice.
    """
    lab = Lab()
    for _ in range(BOOTS):
        try:
            lab.up(
                image,
                memory_mb=command_line.MEMORY_MB,
                cpus=cpus,
                forward=command_line.FORWARDED,
                deadline=BOOT_SECONDS,
            )
            return command_line.start_emberbox(lab)
        except (LabError, subprocess.TimeoutExpired) as error:
            why = limits.why_dead()
            if lab.running() is not None and not why:
                raise NotStarted(str(error)) from error
            say(f"it died: {why}")
            lab.down()
    raise LabError(f"it died in {BOOTS} boots of {BOOTS}")


if __name__ == "__main__":
    raise SystemExit(main())
