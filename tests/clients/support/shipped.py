"""The templates that ship with Emberbox, built on first use."""

from __future__ import annotations

from tests.clients.support.instance import Emberbox
from tests.clients.support.raw import Api
from tests.clients.support.timing import eventually


def ensure_built(emberbox: Emberbox, name: str) -> None:
    """Create sandboxes of the template until one is made, as a user's first create does, and kill that one."""
    with Api(emberbox) as api:

        def created() -> bool:
            answer = api.post("/v2/sandboxes", json={"templateID": name, "timeout": 300})
            if answer.status_code == 201:
                api.delete(f"/sandboxes/{answer.json()['sandboxID']}")
                return True
            assert "being built" in answer.text, f"template {name!r} cannot be had: {answer.status_code} {answer.text}"
            return False

        eventually(created, within=2400, every=2, what=f"template {name!r} is built")
