"""How fast sandboxes may be: what their template asks for, and for the rest what the installation gives.

Rates have the names of the node contract's `Rates`. One that is missing was not asked for; 0 is no limit.
"""

from __future__ import annotations

from collections.abc import Mapping

from emberbox.settings import Settings
from emberbox.wire import node_pb2 as pb

_NAMES = tuple(field.name for field in pb.Rates.DESCRIPTOR.fields)


def given_rates(asked: Mapping[str, int], settings: Settings) -> dict[str, int]:
    """What a new sandbox gets of a template that asks for this: no more than the installation's ceilings."""
    wanted = {name: asked.get(name, getattr(settings, f"default_{name}")) for name in _NAMES}
    ceilings = {name: getattr(settings, f"max_{name}") for name in _NAMES}
    return {name: _lower(rate, ceilings[name]) for name, rate in wanted.items()}


def _lower(one: int, other: int) -> int:
    """The lower of two rates, of which 0 is the highest."""
    return min(rate for rate in (one, other) if rate) if one or other else 0


def kept_rates(given: Mapping[str, int]) -> dict[str, int]:
    """What a snapshot asks for, so that what starts from it gets what its sandbox had, whatever the installation gives
    by then. Sandboxes from before there were rates have none."""
    return {name: given.get(name, 0) for name in _NAMES}
