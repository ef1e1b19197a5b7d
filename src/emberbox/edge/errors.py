"""What can go wrong in the edge."""

from __future__ import annotations


class EdgeError(Exception):
    """Base of the edge's errors. The message is meant for an operator."""


class BadRoute(EdgeError):
    """A route that was told does not have the form of one."""


class ProxyFailed(EdgeError):
    """HAProxy could not be found, started, reloaded or stopped."""


class AdminFailed(EdgeError):
    """HAProxy's admin socket does not answer, or refused a command."""


class BadConfiguration(EdgeError):
    """A setting that the edge cannot work with."""
