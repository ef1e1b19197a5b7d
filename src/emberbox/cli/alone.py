"""`emberbox api|node|edge`: one role in this process."""

from __future__ import annotations

import asyncio
import os

from emberbox.cli.certificates import CertificateCopy
from emberbox.cli.errors import CliError
from emberbox.cli.launch import raise_open_files
from emberbox.cli.layout import ensure_account, make_layout
from emberbox.logs import configure_logging
from emberbox.settings import Settings


def run(name: str, settings: Settings) -> None:
    """Serve until SIGTERM. An api or edge started by root becomes the unprivileged user first.

    Raises:
        CliError: the user is wrong for this role.
    """
    is_root = os.geteuid() == 0
    if name == "node":
        if not is_root:
            raise CliError("the node makes machines and must run as root")
    elif is_root:
        # Not above: the node must be able to set gRPC up before anything imports it.
        from emberbox.cli.roles import role

        account = ensure_account(settings)
        make_layout(settings, account)
        certificates = CertificateCopy(settings, account)
        certificates.refresh()
        start = role(name, certificates.apply(settings))
        # By this the program becomes `launch`, and by that the role as the other user.
        os.execve(start.argv[0], start.argv, start.environment)
    raise_open_files()
    configure_logging(name, settings)
    _serve(name, settings)


def _serve(name: str, settings: Settings) -> None:
    if name == "api":
        from emberbox.api.main import serve as serve_api

        serve_api(settings)
    elif name == "node":
        from emberbox.node.errors import NodeError
        from emberbox.node.main import serve as serve_node

        try:
            asyncio.run(serve_node(settings))
        except NodeError as error:
            raise CliError(f"the node cannot serve: {error}") from error
    else:
        from emberbox.edge.main import serve as serve_edge

        serve_edge(settings)
