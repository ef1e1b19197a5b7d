"""Certificates for the doors between machines."""

from __future__ import annotations

import grpc

from emberbox.settings import Settings


def node_channel_credentials(settings: Settings) -> grpc.ChannelCredentials | None:
    """What a client of the node's TCP address shows; None for a unix socket, whose mode is the check.

    Raises:
        ValueError: a TCP address without all three of certificate, key and authority.
        OSError: one of them cannot be read.
    """
    if settings.node_target.startswith("unix:"):
        return None
    certificate, key, authority = settings.node_tls_cert, settings.node_tls_key, settings.node_tls_ca
    if certificate is None or key is None or authority is None:
        raise ValueError(
            f"node_address {settings.node_target!r} is a TCP address, which is reached over mutual TLS only; set "
            "EMBERBOX_NODE_TLS_CERT, EMBERBOX_NODE_TLS_KEY and EMBERBOX_NODE_TLS_CA"
        )
    return grpc.ssl_channel_credentials(authority.read_bytes(), key.read_bytes(), certificate.read_bytes())
