"""A PostgreSQL cluster of the tests' own, in a temporary directory, on a unix socket."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NEEDED = ("initdb", "pg_ctl", "psql")


def missing() -> str | None:
    """Why there can be no cluster here; None when there can."""
    absent = [name for name in NEEDED if _program(name) is None]
    return f"PostgreSQL is not installed: no {', '.join(absent)} (apt install postgresql)" if absent else None


class Cluster:
    def __init__(self, home: Path, user: str) -> None:
        self.home = home
        self._user = user
        self._number = 0

    def new_database(self) -> str:
        """The URL of an empty database."""
        self._number += 1
        name = f"test_{os.getpid()}_{self._number}"
        self.run("psql", "-h", str(self.home), "-d", "postgres", "-qc", f"CREATE DATABASE {name}")
        return f"postgresql+asyncpg://{self._user}@/{name}?host={self.home}"

    def run(self, program: str, *arguments: str) -> None:
        found = _program(program)
        assert found is not None
        command = [str(found), *arguments]
        if os.geteuid() == 0:
            # PostgreSQL refuses to run as root.
            command = ["setpriv", f"--reuid={self._user}", "--regid", _group(self._user), "--clear-groups", *command]
        environment = {**os.environ, "PGUSER": self._user}
        # Not a pipe: the server keeps it open and the reader would wait for it.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(command, cwd="/", stdout=output, stderr=output, timeout=400, env=environment)
            output.seek(0)
            told = output.read().decode(errors="replace")
        assert done.returncode == 0, told


@contextmanager
def cluster() -> Iterator[Cluster]:
    user = _user()
    home = Path(tempfile.mkdtemp(prefix="eb-pg-"))
    try:
        if os.geteuid() == 0:
            os.chown(home, pwd.getpwnam(user).pw_uid, pwd.getpwnam(user).pw_gid)
        made = Cluster(home, user)
        data = str(home / "data")
        made.run("initdb", "-D", data, "-U", user, "--auth=trust", "--no-sync")
        options = f"-k {home} -c listen_addresses='' -c fsync=off -c max_connections=60"
        made.run("pg_ctl", "-D", data, "-w", "-t", "300", "-l", str(home / "log"), "-o", options, "start")
        try:
            yield made
        finally:
            made.run("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _program(name: str) -> Path | None:
    """From the packages' own directory, newest first: wrappers in PATH may insist on a version."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    if versions:
        return versions[0]
    found = shutil.which(name)
    return Path(found) if found else None


def _user() -> str:
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()).pw_name
    for name in ("postgres", "nobody"):
        try:
            pwd.getpwnam(name)
        except KeyError:
            continue
        return name
    raise AssertionError("there is neither a user 'postgres' nor 'nobody'")


def _group(user: str) -> str:
    return str(pwd.getpwnam(user).pw_gid)
