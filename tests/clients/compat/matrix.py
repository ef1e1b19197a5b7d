"""Runs the small suites against several releases of E2B's clients and writes docs/compatibility.md's tested table.

    python -m tests.clients.compat.matrix [--only python|javascript|cli] [--no-write]

Each release gets a fresh environment, each case a process of its own with a hard time limit: a release that hangs
is a failed case with a name, not a matrix that never ends. The exit code is 1 when any case fails.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.clients.compat import cli_suite
from tests.clients.support import instance
from tests.clients.support.instance import ROOT, Emberbox
from tests.clients.support.timing import SCALE, seconds

HERE = Path(__file__).parent
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- tested releases: begin -->", "<!-- tested releases: end -->"

PYTHON_RELEASES = ["1.11.1", "2.0.2", "2.15.3", "2.29.6", "2.45.1", "2.51.0", "newest"]
JAVASCRIPT_RELEASES = ["1.13.2", "2.0.1", "2.15.0", "2.29.1", "2.45.0", "newest"]
CLI_RELEASES = 2
"""How many of the newest releases of the CLI."""

BY_NAME = {"1.11.1", "2.0.2", "2.15.3", "1.13.2", "2.0.1"}
"""Releases that are run by name, over TLS, under E2B_DOMAIN.

The oldest cannot be given addresses. Python 2.15 can, but its `Sandbox.connect` then says nowhere which sandbox it
means: it sends neither the host name nor the E2b-Sandbox-Id header.
"""

DOMAIN = "emberbox.test"
CASE_SECONDS = 30.0


@dataclass(frozen=True)
class Outcome:
    """How one case of one release went: `ok`, `absent` (not in the release), `failed` or `hung`."""

    case: str
    result: str
    seconds: float
    detail: str = ""


@dataclass
class Release:
    """One release of one client and its outcomes."""

    client: str
    version: str
    outcomes: list[Outcome] = field(default_factory=list)
    broken: str = ""

    @property
    def passed(self) -> bool:
        return not self.broken and all(each.result in ("ok", "absent") for each in self.outcomes)


# ---- one case


def run_case(name: str, command: list[str], env: Mapping[str, str], cwd: Path) -> Outcome:
    """Run `command` with a hard limit; its whole process group ends with it."""
    limit = seconds(CASE_SECONDS)
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env={**env, "CASE_SECONDS": str(limit)}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read().strip()
    took = time.monotonic() - started
    if code == 0:
        return Outcome(name, "ok", took)
    if code == 3:
        return Outcome(name, "absent", took, text)
    if code is None:
        return Outcome(name, "hung", took, f"no end within {limit:.0f} s\n{text}")
    return Outcome(name, "failed", took, text)


# ---- environments


def base_environment(emberbox: Emberbox, world: World, version: str) -> dict[str, str]:
    """What a user of this release would have set, and nothing else of E2B's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("E2B_")}
    address = (
        {"E2B_DOMAIN": world.domain, "E2B_API_KEY": emberbox.api_key, "TEST_DOMAIN": DOMAIN}
        if version in BY_NAME
        else emberbox.client_env
    )
    trust = {"SSL_CERT_FILE": str(world.bundle), "NODE_EXTRA_CA_CERTS": str(world.bundle)}
    return {**kept, **address, **trust, "EMBERBOX_TEST_SCALE": str(SCALE), "NO_COLOR": "1"}


def python_release(version: str, emberbox: Emberbox, world: World) -> Release:
    home = world.folder / f"python-{version}"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True, capture_output=True)
    python = home / "bin" / "python"
    package = "e2b" if version == "newest" else f"e2b=={version}"
    installed = subprocess.run(
        [str(python), "-m", "pip", "install", "-q", package], capture_output=True, text=True, check=False
    )
    if installed.returncode != 0:
        return Release("python", version, broken=f"pip install {package} failed:\n{installed.stderr[-2000:]}")
    found = _output([str(python), "-c", "import importlib.metadata as m; print(m.version('e2b'))"])
    release = Release("python", found)
    if version in BY_NAME:
        packages = Path(_output([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]))
        shutil.copy(HERE / "names.py", packages / "sitecustomize.py")
        # The trust store of this environment, as an administrator would extend it.
        with (packages / "certifi" / "cacert.pem").open("a") as store:
            store.write("\n" + world.certificate_authority.read_text())
    env = base_environment(emberbox, world, version)
    suite = str(HERE / "python_suite.py")
    for case in _output([str(python), suite, "--list"]).split():
        release.outcomes.append(_report(release, run_case(case, [str(python), suite, case], env, home)))
    return release


def javascript_release(version: str, emberbox: Emberbox, world: World) -> Release:
    home = world.folder / f"javascript-{version}"
    home.mkdir()
    broken = _npm_install(home, "e2b" if version == "newest" else f"e2b@{version}")
    if broken:
        return Release("javascript", version, broken=broken)
    found = json.loads((home / "node_modules" / "e2b" / "package.json").read_text())["version"]
    release = Release("javascript", found)
    for name in ("suite.mjs", "names.mjs"):
        shutil.copy(HERE / name, home)
    node = ["node", *(["--import", "./names.mjs"] if version in BY_NAME else []), "suite.mjs"]
    env = base_environment(emberbox, world, version)
    for case in _output([*node, "--list"], cwd=home).split():
        release.outcomes.append(_report(release, run_case(case, [*node, case], env, home)))
    return release


def cli_release(version: str, emberbox: Emberbox, world: World) -> Release:
    home = world.folder / f"cli-{version}"
    home.mkdir()
    broken = _npm_install(home, f"@e2b/cli@{version}")
    if broken:
        return Release("cli", version, broken=broken)
    release = Release("cli", version)
    env = base_environment(emberbox, world, version) | {
        "HOME": str(home), "E2B": str(home / "node_modules" / ".bin" / "e2b"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    for case in cli_suite.CASES:
        command = [sys.executable, "-m", "tests.clients.compat.cli_suite", case]
        release.outcomes.append(_report(release, run_case(case, command, env, ROOT)))
    return release


def newest_cli_releases(count: int) -> list[str]:
    versions = json.loads(_output(["npm", "view", "@e2b/cli", "versions", "--json"]))
    finals = [each for each in versions if "-" not in each]
    return sorted(finals, key=lambda each: [int(part) for part in each.split(".")])[-count:]


def _npm_install(home: Path, package: str) -> str:
    (home / "package.json").write_text('{"private": true, "type": "module"}')
    done = subprocess.run(
        ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", package],
        cwd=home, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return "" if done.returncode == 0 else f"npm install {package} failed:\n{done.stderr[-2000:]}"


def _output(command: list[str], cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout.strip()


def _report(release: Release, outcome: Outcome) -> Outcome:
    line = f"{release.client:<10} {release.version:<8} {outcome.case:<18} {outcome.result:<7} {outcome.seconds:5.1f} s"
    print(line, flush=True)
    if outcome.result in ("failed", "hung"):
        print("    " + outcome.detail[-4000:].replace("\n", "\n    "), flush=True)
    return outcome


# ---- the world they run in


@dataclass(frozen=True)
class World:
    """What all releases share: a scratch folder, a domain over TLS, and the authority that signed its certificate."""

    folder: Path
    certificate_authority: Path
    bundle: Path
    certificate: Path
    key: Path
    tls_port: int

    @property
    def domain(self) -> str:
        return f"{DOMAIN}:{self.tls_port}"


@contextlib.contextmanager
def make_world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="emberbox-compat-") as folder:
        yield _certified(Path(folder))


def _certified(folder: Path) -> World:
    authority, authority_key = folder / "ca.pem", folder / "ca.key"
    certificate, key, request = folder / "tls.pem", folder / "tls.key", folder / "tls.csr"
    _openssl(
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=Emberbox test authority",
        "-keyout", str(authority_key), "-out", str(authority),
    )  # fmt: skip
    _openssl(
        "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN=*.{DOMAIN}", "-keyout", str(key), "-out", str(request)
    )
    names = folder / "names.cnf"
    names.write_text(f"subjectAltName=DNS:*.{DOMAIN},DNS:{DOMAIN}\n")
    _openssl(
        "x509", "-req", "-days", "2", "-in", str(request), "-CA", str(authority), "-CAkey", str(authority_key),
        "-CAcreateserial", "-extfile", str(names), "-out", str(certificate),
    )  # fmt: skip
    bundle = folder / "bundle.pem"
    system = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
    bundle.write_text((system.read_text() if system.is_file() else "") + "\n" + authority.read_text())
    # The unprivileged edge reads the certificate.
    folder.chmod(0o755)
    key.chmod(0o644)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return World(folder, authority, bundle, certificate, key, port)


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def an_emberbox(world: World) -> Iterator[Emberbox]:
    given = instance.from_environment()
    if given is not None:
        yield given
        return
    own = instance.start(
        settings={
            "EMBERBOX_DOMAIN": world.domain,
            "EMBERBOX_EDGE_TLS_PORT": str(world.tls_port),
            "EMBERBOX_TLS_CERT": str(world.certificate),
            "EMBERBOX_TLS_KEY": str(world.key),
        }
    )
    try:
        yield own
    finally:
        own.down()
        instance.remove(own)


# ---- the page


def table(releases: list[Release], title: str, client: str) -> str:
    rows = [each for each in releases if each.client == client]
    cases = list(dict.fromkeys(outcome.case for row in rows for outcome in row.outcomes))
    head = ["release", *(case.replace("_", " ") for case in cases)]
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    words = {"ok": "yes", "absent": "–", "failed": "**no**", "hung": "**hangs**"}
    for row in rows:
        results = {outcome.case: words[outcome.result] for outcome in row.outcomes}
        cells = [results.get(case, "**not installed**" if row.broken else "") for case in cases]
        lines.append("| " + " | ".join([row.version, *cells]) + " |")
    return "\n".join(lines)


TITLES = {"python": "Python `e2b`", "javascript": "JavaScript `e2b`", "cli": "Command line `@e2b/cli`"}


def write_page(releases: list[Release], runtime: str) -> None:
    """Put the tables of the clients that were run into the page; those of the others stay."""
    text = PAGE.read_text() if PAGE.exists() else ""
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{PAGE} has no place for the table: it needs the lines {BEGIN} and {END}")
    head, _, rest = text.partition(BEGIN)
    old, _, tail = rest.partition(END)
    today = datetime.date.today().isoformat()
    about = (
        f"Tested on {today} with the `{runtime}` runtime by `make compat`. A dash: the release does not have it. "
        "The last line of each table is the newest release that the registry gave on that day. "
        f"Run by name over TLS (`E2B_DOMAIN`) instead of by address: {', '.join(sorted(BY_NAME))}; the oldest cannot "
        "be given addresses, and Python 2.15's `Sandbox.connect` sends no sandbox ID with `E2B_SANDBOX_URL`."
    )
    run = {each.client for each in releases}
    tables = [
        table(releases, title, client) if client in run else _section(old, title) for client, title in TITLES.items()
    ]
    PAGE.write_text(head + "\n\n".join([BEGIN, about, *filter(None, tables), END]) + tail)


def _section(text: str, title: str) -> str:
    """The part of a page below one heading, up to the next."""
    _, found, rest = text.partition(f"### {title}\n")
    return f"### {title}\n{rest.partition('### ')[0]}".rstrip() if found else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("python", "javascript", "cli"))
    parser.add_argument("--release", help="only this release")
    parser.add_argument("--no-write", action="store_true", help="leave docs/compatibility.md as it is")
    arguments = parser.parse_args()
    runners: dict[str, tuple[list[str], Callable[[str, Emberbox, World], Release]]] = {
        "python": (PYTHON_RELEASES, python_release),
        "javascript": (JAVASCRIPT_RELEASES, javascript_release),
        "cli": ([], cli_release),
    }
    # What was started ends also when this is told to stop.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    releases: list[Release] = []
    with make_world() as world, an_emberbox(world) as emberbox:
        runtime = emberbox.status()["runtime"] if emberbox.data_dir else "given"
        for client, (versions, run) in runners.items():
            if arguments.only not in (None, client):
                continue
            if client == "cli":
                versions = newest_cli_releases(CLI_RELEASES)
            for version in versions:
                if arguments.release not in (None, version):
                    continue
                release = run(version, emberbox, world)
                if release.broken:
                    print(f"{client} {version}: {release.broken}", flush=True)
                releases.append(release)
    failed = [each for each in releases if not each.passed]
    for each in failed:
        bad = [outcome.case for outcome in each.outcomes if outcome.result in ("failed", "hung")]
        print(f"FAILED: {each.client} {each.version}: {', '.join(bad) or 'could not be installed'}", flush=True)
    print(f"{len(releases) - len(failed)} of {len(releases)} releases work with every case")
    if arguments.release is None and not arguments.no_write:
        write_page(releases, runtime)
    return 1 if failed or not releases else 0


if __name__ == "__main__":
    raise SystemExit(main())
