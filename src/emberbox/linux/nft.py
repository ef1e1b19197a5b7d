"""nftables through libnftables: text in, one atomic transaction."""

from __future__ import annotations

import ctypes
import ctypes.util
import threading


class NftError(Exception):
    """The kernel or the parser refused a transaction; nothing of it was applied."""


class Nft:
    """One libnftables context. Calls block for some milliseconds and may come from any thread, one at a time."""

    def __init__(self) -> None:
        name = "libnftables.so.1"
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            raise NftError(f"{name} is not installed; `apt install nftables` (see `emberbox doctor`)") from error
        library.nft_ctx_new.restype = ctypes.c_void_p
        for function in ("nft_ctx_free", "nft_ctx_buffer_output", "nft_ctx_buffer_error"):
            getattr(library, function).argtypes = [ctypes.c_void_p]
        for function in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
            getattr(library, function).argtypes = [ctypes.c_void_p]
            getattr(library, function).restype = ctypes.c_char_p
        library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        self._library = library
        self._lock = threading.Lock()

    def run(self, commands: str) -> str:
        """Run `commands` (nft's own language) as one transaction; returns what they print.

        Raises:
            NftError: with nft's own words.
        """
        library = self._library
        with self._lock:
            # A context of its own for each call: a kept one caches the ruleset that others change.
            context = library.nft_ctx_new(0)
            try:
                library.nft_ctx_buffer_output(context)
                library.nft_ctx_buffer_error(context)
                failed = library.nft_run_cmd_from_buffer(context, commands.encode())
                output = (library.nft_ctx_get_output_buffer(context) or b"").decode()
                error = (library.nft_ctx_get_error_buffer(context) or b"").decode().strip()
            finally:
                library.nft_ctx_free(context)
        if failed:
            raise NftError(error or "nftables refused the rules")
        return output
