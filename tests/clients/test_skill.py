"""The Agent Skill's instructions work as printed, and everything published is true of a live Emberbox."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from pyld import jsonld

from emberbox.cli.skill import install
from tests.clients.support.timing import seconds


@pytest.fixture
def skill(tmp_path: Path) -> Path:
    return install(tmp_path / "skills")


def run(skill: Path, emberbox, tmp_path: Path, script: str) -> subprocess.CompletedProcess[str]:
    # `python3` in the instructions is whatever Python the agent has.
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "python3").unlink(missing_ok=True)
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    environment = {
        **os.environ,
        **emberbox.client_env,
        "TMPDIR": str(tmp_path),
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=skill,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds(400),
        check=False,
    )


def test_every_command_block_of_the_skill_works_in_order(skill, emberbox, tmp_path):
    blocks = re.findall(r"```bash\n(.*?)```", (skill / "SKILL.md").read_text(), re.DOTALL)

    done = run(skill, emberbox, tmp_path, "\n".join(blocks))

    assert done.returncode == 0, done.stderr
    assert "42" in done.stdout
    assert "hello world from /tmp" in done.stdout
    assert "8000-" in done.stdout
    assert done.stdout.rstrip().endswith("killed")
    assert (tmp_path / "out.txt").read_text() == "from a file\n"


def test_the_skill_says_what_was_refused(skill, emberbox, tmp_path):
    done = run(skill, emberbox, tmp_path, "python3 scripts/sandbox.py run inosuchsandbox00000a true")

    assert done.returncode == 2
    assert "was not found" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_skill_passes_on_exit_codes_and_both_outputs(skill, emberbox, tmp_path, sandbox):
    script = f"python3 scripts/sandbox.py run {sandbox.sandbox_id} 'echo out; echo problem >&2; exit 7'"

    done = run(skill, emberbox, tmp_path, script)

    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "problem\n")


def fetch(url: str, **headers: str) -> tuple[str, bytes]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=seconds(400)) as response:
        return response.headers["content-type"], response.read()


def test_a_live_sandbox_is_what_its_schema_says_and_expands_as_linked_data(emberbox, sandbox):
    base = emberbox.client_env["E2B_API_URL"]
    key = {"X-API-Key": emberbox.client_env["E2B_API_KEY"]}
    schema = json.loads(fetch(f"{base}/schemas/sandbox.json")[1])

    kind, body = fetch(f"{base}/sandboxes/{sandbox.sandbox_id}", Accept="application/ld+json", **key)

    shown = json.loads(body)
    assert kind.startswith("application/ld+json")
    assert list(Draft202012Validator(schema).iter_errors(shown)) == []
    plain = json.loads(fetch(f"{base}/v1/sandboxes/{sandbox.sandbox_id}", **key)[1])
    assert {name: value for name, value in shown.items() if not name.startswith("@")} == plain
    expanded = jsonld.expand(shown, {"documentLoader": _loader})
    assert expanded[0]["@type"] == [f"{base}/ns/Sandbox"]
    assert expanded[0]["@id"] == f"{base}/sandboxes/{sandbox.sandbox_id}"


def test_live_templates_are_what_their_schema_says(emberbox):
    base = emberbox.client_env["E2B_API_URL"]
    schema = json.loads(fetch(f"{base}/schemas/template.json")[1])

    templates = json.loads(fetch(f"{base}/templates", **{"X-API-Key": emberbox.client_env["E2B_API_KEY"]})[1])

    assert templates
    for template in templates:
        assert list(Draft202012Validator(schema).iter_errors(template)) == []


def _loader(url: str, _options: object = None) -> dict[str, object]:
    kind, body = fetch(url)
    return {"contentType": kind, "contextUrl": None, "documentUrl": url, "document": json.loads(body)}
