"""The lab's command line: `python tests/lab/lab.py up | env | shell COMMAND | status | down | image`.

A KVM host under QEMU's TCG, so that real Firecracker guests run on a machine without hardware virtualization.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent / "src"), str(HERE.parent.parent)]

from emberbox.runtime.firecracker.errors import GuestFilesError  # noqa: E402
from tests.lab.host import Lab, LabError  # noqa: E402
from tests.lab.recipe import RecipeError, build, say  # noqa: E402

API_PORT = 3000
EDGE_PORT = 3002
FORWARDED = [API_PORT, EDGE_PORT]
ENVIRONMENT = "/usr/lib/emberbox-lab/environment"
"""Sets what the lab's Emberbox is configured with, and goes to its folder."""
MEMORY_MB = 4096
START_SECONDS = 600
TEST_SCALE = "15"


def main() -> int:
    args = _parser().parse_args()
    try:
        return int(args.run(args))
    except (LabError, RecipeError, GuestFilesError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    except subprocess.TimeoutExpired as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lab.py", description=__doc__)
    commands = parser.add_subparsers(required=True)

    up = commands.add_parser("up", help="boot the lab; makes its image first when the cache has none")
    up.add_argument(
        "--suite",
        default="bookworm",
        help="release of Debian or Ubuntu on the lab host: bookworm, trixie or noble (default: %(default)s)",
    )
    up.add_argument("--bare", action="store_true", help="do not install the working tree")
    up.add_argument("--memory", type=int, default=MEMORY_MB, metavar="MIB")
    up.add_argument("--cpus", type=int, default=2, help="what keeps the second one alive is in ADR 22")
    up.add_argument("--deadline", type=float, default=180, metavar="SECONDS")
    up.set_defaults(run=_up)

    env = commands.add_parser("env", help="print the variables for clients on this machine")
    env.set_defaults(run=_env)

    image = commands.add_parser("image", help="only make the image")
    image.add_argument("--suite", default="bookworm")
    image.add_argument("--bare", action="store_true")
    image.set_defaults(run=_image)

    down = commands.add_parser("down", help="end the lab and remove what it made")
    down.set_defaults(run=_down)

    shell = commands.add_parser("shell", help="run a command in the lab as root")
    shell.add_argument("command", nargs="+")
    shell.set_defaults(run=_shell)

    status = commands.add_parser("status", help="say whether a lab runs, and its forwarded ports")
    status.set_defaults(run=_status)
    return parser


def _up(args: argparse.Namespace) -> int:
    image = build(args.suite, install=not args.bare)
    lab = Lab()
    lab.up(image, memory_mb=args.memory, cpus=args.cpus, forward=FORWARDED, deadline=args.deadline)
    if args.bare:
        return 0
    _print(start_emberbox(lab))
    return 0


def start_emberbox(lab: Lab, settings: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Start Emberbox in the lab and return the variables for clients on this machine.

    Args:
        settings: environment variables for it, beside the lab's own.

    Raises:
        LabError: it did not start; the lab is left running.
    """
    say("starting Emberbox")
    started = time.monotonic()
    done = lab.shell(in_emberbox("emberbox", "up", "--detach", settings=settings) + " >&2", timeout=START_SECONDS)
    if done.returncode != 0:
        raise LabError("Emberbox did not start in the lab, which is left running: see 'lab.py shell', 'lab.py down'")
    say(f"Emberbox is ready after {time.monotonic() - started:.0f} s")
    return client_variables(lab)


def in_emberbox(*module: str, settings: Mapping[str, str] = MappingProxyType({})) -> str:
    """The shell command that runs a module of Emberbox's installation in the lab, with its settings."""
    own = [f"{name}={value}" for name, value in settings.items()]
    return f". {ENVIRONMENT} && {shlex.join(['env', *own, '.venv/bin/python', '-m', *module])}"


def _env(_: argparse.Namespace) -> int:
    _print(client_variables(Lab()))
    return 0


def _print(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")


def client_variables(lab: Lab) -> dict[str, str]:
    """What clients on this machine need, and the scale of the tests' times.

    Raises:
        LabError: no Emberbox runs there.
    """
    done = lab.shell(in_emberbox("emberbox", "env", "--json"), capture=True, timeout=120)
    boot = lab.running()
    if done.returncode != 0 or boot is None:
        raise LabError(f"Emberbox does not run in the lab: {done.stderr.decode('utf-8', 'replace').strip()}")
    variables = json.loads(done.stdout)
    variables["E2B_API_URL"] = f"http://127.0.0.1:{boot.ports[str(API_PORT)]}"
    variables["E2B_SANDBOX_URL"] = f"http://127.0.0.1:{boot.ports[str(EDGE_PORT)]}"
    return {**variables, "EMBERBOX_TEST_SCALE": TEST_SCALE}


def _image(args: argparse.Namespace) -> int:
    print(build(args.suite, install=not args.bare).disk)
    return 0


def _down(_: argparse.Namespace) -> int:
    print("lab: ended" if Lab().down() else "lab: none was running")
    return 0


def _shell(args: argparse.Namespace) -> int:
    return Lab().shell(" ".join(args.command)).returncode


def _status(_: argparse.Namespace) -> int:
    boot = Lab().running()
    if boot is None:
        print("lab: not running")
        return 1
    print(f"lab: running, pid {boot.pid}, {boot.cpus} CPUs, {boot.memory_mb} MiB")
    for inner, outer in boot.ports.items():
        print(f"  127.0.0.1:{outer} -> {inner}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
