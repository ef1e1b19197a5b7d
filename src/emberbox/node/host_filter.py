"""Making room in a host's own packet filter.

Docker and ufw set the policy of iptables' FORWARD (ufw: INPUT too) to DROP. A packet has to be accepted by every filter
of the host, ours alone is not enough: sandboxes would have no internet, and no names. Where the policy drops, this
adds rules for the slots' interfaces, whose packets our table has judged before. They go when the last slot goes.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from emberbox.commands import CommandFailed, run

log = structlog.get_logger("emberbox.node")

_SECONDS = 10.0


class HostFilter:
    """The rules for one instance in iptables, IPv4. A host without iptables needs none."""

    def __init__(self, instance: str, *, command: Sequence[str] = ("iptables",)) -> None:
        """`command`: how to call iptables, for tests in a namespace."""
        self._command = tuple(command)
        interfaces = f"{instance}-+"
        self._rules = {
            "INPUT": (("-i", interfaces, "-j", "ACCEPT"),),
            "FORWARD": (("-i", interfaces, "-j", "ACCEPT"), ("-o", interfaces, "-j", "ACCEPT")),
        }

    async def open(self) -> None:
        """Add what is missing, in the chains that drop by default."""
        for chain, rules in self._rules.items():
            policy = await self._iptables("-S", chain)
            if policy is None or not policy.startswith(f"-P {chain} DROP"):
                continue
            for rule in rules:
                if await self._iptables("-C", chain, *rule) is None:
                    await self._iptables("-I", chain, *rule)
                    log.info("host_filter.opened", chain=chain, rule=" ".join(rule))

    async def close(self) -> None:
        """Remove the rules."""
        for chain, rules in self._rules.items():
            for rule in rules:
                if await self._iptables("-C", chain, *rule) is not None:
                    await self._iptables("-D", chain, *rule)

    async def _iptables(self, *words: str) -> str | None:
        """What iptables prints; None when it is not there or says no."""
        try:
            return (await run((*self._command, "-w", "5", *words), timeout=_SECONDS)).text
        except CommandFailed:
            return None
