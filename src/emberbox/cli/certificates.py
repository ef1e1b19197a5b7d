"""TLS files for the edge, which may not read root's: a copy of its own, renewed when the originals change."""

from __future__ import annotations

import os
from pathlib import Path

from emberbox.cli.errors import CliError
from emberbox.cli.launch import Account
from emberbox.settings import Settings


class CertificateCopy:
    """The certificate and key in `data_dir`/run/tls, readable by root and the edge's user only."""

    def __init__(self, settings: Settings, account: Account) -> None:
        self._account = account
        self._folder = settings.run_dir / "tls"
        self._pairs = [
            (original, self._folder / name)
            for original, name in ((settings.tls_cert, "certificate.pem"), (settings.tls_key, "key.pem"))
            if original is not None
        ]
        self._seen: list[tuple[int, int]] = []
        if len(self._pairs) == 1:
            raise CliError("TLS needs both a certificate and its key: --tls-cert and --tls-key")

    def apply(self, settings: Settings) -> Settings:
        """`settings` with the copies in place of the originals."""
        if not self._pairs:
            return settings
        (_, certificate), (_, key) = self._pairs
        return settings.model_copy(update={"tls_cert": certificate, "tls_key": key})

    def refresh(self) -> bool:
        """Copy when an original has changed since the last call. True when it had.

        Raises:
            CliError: an original cannot be read.
        """
        if not self._pairs:
            return False
        try:
            seen = [(status.st_ino, status.st_mtime_ns) for status in (original.stat() for original, _ in self._pairs)]
            if seen == self._seen:
                return False
            self._folder.mkdir(mode=0o750, exist_ok=True)
            os.chown(self._folder, 0, self._account.gid)
            for original, copy in self._pairs:
                self._copy(original.read_bytes(), copy)
        except OSError as error:
            raise CliError(f"the TLS file {error.filename} cannot be read: {error.strerror}") from None
        self._seen = seen
        return True

    def _copy(self, content: bytes, target: Path) -> None:
        fresh = target.with_name(target.name + ".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o640)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            os.fchown(handle.fileno(), 0, self._account.gid)
        fresh.rename(target)
