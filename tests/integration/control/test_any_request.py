"""Whatever is sent, in or out of the schema: an answer in the declared shape, and never a fault of ours."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

from tests.support.control import ADMIN_TOKEN, World
from tests.support.live import live_world

EXAMPLES = 4


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[World, str]]:
    with live_world(rate_per_second=0, max_sandboxes=20) as found:
        yield found


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
def test_no_request_makes_a_fault(live: tuple[World, str], mode: GenerationMode) -> None:
    world, url = live
    assert world.app is not None
    schema = schemathesis.openapi.from_dict(world.app.openapi())
    keyed, admin = {"X-API-Key": world.key}, {"X-Admin-Token": ADMIN_TOKEN}
    tried = 0

    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def answers(case: schemathesis.Case) -> None:
            headers = admin if case.path.startswith(("/admin", "/nodes")) else keyed
            answer = case.call(base_url=url, headers=headers, timeout=120)
            told = (case.as_curl_command(), answer.status_code, answer.text)
            assert answer.status_code < 500 or answer.status_code == 501, told
            assert answer.status_code not in (401, 422) or case.path == "/v2/sandboxes", told
            if answer.status_code >= 400:
                assert {"code", "message"} <= set(answer.json())
                assert answer.headers.get("should-retry") in (["true"], ["false"]), (
                    case.as_curl_command(),
                    answer.text,
                )

        try:
            answers()
        except Unsatisfiable:
            # An operation without parameters and body cannot be asked wrongly.
            assert mode is GenerationMode.NEGATIVE
            continue
        tried += 1

    assert tried > 40
