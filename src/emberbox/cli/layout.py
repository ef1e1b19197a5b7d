"""The data directory of one instance: who owns what in it, and the user that api and edge run as."""

from __future__ import annotations

import os
import pwd
import secrets
import subprocess
from pathlib import Path

from emberbox.cli.errors import CliError
from emberbox.cli.launch import Account
from emberbox.settings import Settings


def ensure_account(settings: Settings) -> Account:
    """The unprivileged user, made as a system user when it is missing.

    Raises:
        CliError: it cannot be made, or is root.
    """
    name = settings.api_user
    try:
        pwd.getpwnam(name)
    except KeyError:
        command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent",
                   "--shell", "/usr/sbin/nologin", name]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        # 9: someone else has just made it (useradd(8)).
        if done.returncode not in (0, 9):
            raise CliError(f"cannot make the user {name!r}: {done.stderr.strip()}") from None
    account = Account.named(name)
    if account.uid == 0:
        raise CliError(f"api and edge must not run as {name!r}, which is root: name another user with --user")
    return account


def make_layout(settings: Settings, account: Account) -> None:
    """Create what is missing in the data directory and set owners and modes. Idempotent.

    Raises:
        CliError: the directory cannot be used.
    """
    try:
        _directory(settings.data_dir, 0o755)
        _directory(settings.node_dir, 0o700)
        _directory(settings.data_dir / "logs", 0o750, group=account.gid)
        # Sticky: the api's user makes sockets here, and cannot replace what root has put here.
        _directory(settings.run_dir, 0o1771, group=account.gid)
        _directory(settings.run_dir / "supervisor", 0o700)
        _directory(settings.api_dir, 0o700, user=account.uid, group=account.gid)
        _directory(settings.edge_dir, 0o700, user=account.uid, group=account.gid)
        _secret(settings.edge_secret_path, account)
    except OSError as error:
        raise CliError(f"the data directory {settings.data_dir} cannot be used: {error}") from None


def _directory(path: Path, mode: int, *, user: int = 0, group: int = 0) -> None:
    path.mkdir(parents=True, exist_ok=True)
    # The api's user owns directories next to ours; it must not lead root's chown elsewhere by a symbolic link.
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fchown(descriptor, user, group)
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def _secret(path: Path, account: Account) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as handle:
        handle.write(secrets.token_hex(32))
        os.fchown(handle.fileno(), account.uid, account.gid)
