"""Templates built inside microVMs, and what their saved memory brings along."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from e2b import Sandbox, SandboxException, Template, wait_for_port
from e2b.exceptions import BuildException
from e2b_code_interpreter import Sandbox as Interpreter

from tests.lab.support import KvmHost, grows, node_killed

TREE = Path(__file__).resolve().parents[2]
INTERPRETER = TREE / "templates" / "code-interpreter-v1"
SERVER = ("fastapi", "uvicorn", "jupyter_client", "ipykernel")
"""Of the template's packages those that its server and its Python kernel cannot do without."""
PATIENCE = 450.0


@pytest.fixture
def api() -> Iterator[httpx.Client]:
    """The API itself, for what the SDK has no call for."""
    from tests.clients.support.instance import from_environment
    from tests.clients.support.raw import Api

    emberbox = from_environment()
    assert emberbox is not None
    with Api(emberbox) as made:
        made.timeout = httpx.Timeout(PATIENCE)
        yield made


@pytest.fixture
def name(api: httpx.Client) -> Iterator[str]:
    """A name for a template, which is deleted afterwards."""
    chosen = f"lab-{uuid.uuid4().hex[:12]}"
    yield chosen
    assert api.delete(f"/templates/{chosen}").status_code in (204, 404)


@pytest.fixture
def start(name: str) -> Iterator[Callable[[], Sandbox]]:
    """Start sandboxes from the template, which end with the test."""
    made: list[Sandbox] = []

    def create() -> Sandbox:
        made.append(Sandbox.create(name, timeout=1800, request_timeout=PATIENCE))
        return made[-1]

    yield create
    for sandbox in made:
        sandbox.kill(request_timeout=PATIENCE)


def build_with_rates(api: httpx.Client, name: str, rates: Mapping[str, int]) -> None:
    """Make a template that is the base with other rates."""
    made = api.post("/v3/templates", json={"name": name, "cpuCount": 1, "memoryMB": 256, **rates}).json()
    template, build = made["templateID"], made["buildID"]
    api.post(f"/v2/templates/{template}/builds/{build}", json={"fromTemplate": "base"}).raise_for_status()
    deadline = time.monotonic() + PATIENCE
    status: dict[str, object] = {}
    while status.get("status") != "ready":
        assert status.get("status") != "error", status
        assert time.monotonic() < deadline, status
        time.sleep(1)
        status = api.get(f"/templates/{template}/builds/{build}/status").json()


def run(sandbox: Sandbox, command: str) -> str:
    return sandbox.commands.run(command, timeout=PATIENCE, request_timeout=PATIENCE).stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_build_copies_runs_and_keeps_its_start_command_in_memory(
    name: str, start: Callable[[], Sandbox], tmp_path: Path
) -> None:
    (tmp_path / "server.py").write_text(
        "import http.server, time\n"
        "began = str(time.time()).encode()\n"
        "class Answer(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers(); self.wfile.write(began)\n"
        "http.server.HTTPServer(('127.0.0.1', 8123), Answer).serve_forever()\n"
    )
    template = (
        Template(file_context_path=tmp_path)
        .from_template("base")
        .copy("server.py", "/opt/server.py", user="root", mode=0o644)
        .set_envs({"COLOUR": "blue"})
        .run_cmd("echo $COLOUR > ~/colour; id -un > ~/who")
        .set_start_cmd("python3 /opt/server.py", wait_for_port(8123))
    )
    lines: list[str] = []

    Template.build(
        template, name, cpu_count=1, memory_mb=256, on_build_logs=lambda line: lines.append(str(line.message))
    )
    built = time.time()
    one, two = start(), start()

    assert run(one, "cat ~/colour ~/who").splitlines() == ["blue", "user"]
    began = [float(run(sandbox, "curl -s http://127.0.0.1:8123/")) for sandbox in (one, two)]
    assert began[0] == began[1], "each sandbox started the server anew: it is not in the memory"
    assert began[0] < built
    listed = [each.cmd + " ".join(each.args) for each in one.commands.list(request_timeout=PATIENCE)]
    assert any("/opt/server.py" in command for command in listed), listed
    assert lines


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_guest_with_memory_on_both_sides_of_the_gap_below_4_gib_is_resumed_and_forked(
    name: str, start: Callable[[], Sandbox]
) -> None:
    """Firecracker maps what lies above 3 GiB apart from the rest, and the kernel takes that first."""
    Template.build(Template().from_template("base").run_cmd("true"), name, cpu_count=1, memory_mb=3584)
    sandbox = start()
    look = "md5sum < /dev/shm/numbers; awk '/MemTotal/ {print $2}' /proc/meminfo"
    said = run(sandbox, f"seq 1000000 > /dev/shm/numbers; {look}")
    assert int(said.split()[-1]) > 3 * 1024 * 1024

    for _ in range(2):
        sandbox.pause(request_timeout=PATIENCE)
        sandbox = Sandbox.connect(sandbox.sandbox_id, timeout=1800, request_timeout=PATIENCE)
        assert run(sandbox, look) == said
    (fork,) = sandbox.fork(count=1, timeout=1800, request_timeout=PATIENCE)
    try:
        assert run(fork, look) == said
        assert run(sandbox, look) == said
    finally:
        fork.kill(request_timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_disk_is_as_slow_as_its_template_says_also_after_a_pause_and_in_a_fork(
    name: str, start: Callable[[], Sandbox], api: httpx.Client
) -> None:
    build_with_rates(api, name, {"diskMBPerSecond": 2})
    sandbox = start()
    # Past every cache. Two seconds' worth may come at once: what is over from the second before, and that second's.
    direct = "dd bs=1M count=16 conv=notrunc"
    write, read = f"{direct} if=/dev/zero of=~/file oflag=direct", f"{direct} if=~/file of=/dev/null iflag=direct"

    def seconds_of(where: Sandbox, command: str) -> float:
        return float(run(where, f"TIMEFORMAT=%R; {{ time {command} 2>/dev/null; }} 2>&1"))

    def assert_slow(where: Sandbox) -> None:
        for command in (write, read):
            assert 6 <= seconds_of(where, command) <= 30, command

    assert_slow(sandbox)
    sandbox.pause(request_timeout=PATIENCE)
    sandbox = Sandbox.connect(sandbox.sandbox_id, timeout=1800, request_timeout=PATIENCE)
    assert_slow(sandbox)
    (fork,) = sandbox.fork(count=1, timeout=1800, request_timeout=PATIENCE)
    try:
        assert_slow(fork)
    finally:
        fork.kill(request_timeout=PATIENCE)
    unlimited = Sandbox.create(timeout=1800, request_timeout=PATIENCE)
    try:
        assert seconds_of(unlimited, write) < 6, "the disk is slow without a rate: the times above show nothing"
    finally:
        unlimited.kill(request_timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_node_killed_while_the_memory_of_a_template_is_saved_leaves_no_half(
    name: str, start: Callable[[], Sandbox], host: KvmHost
) -> None:
    def build() -> None:
        template = Template().from_template("base").run_cmd("echo built > ~/built")
        Template.build(template, name, cpu_count=1, memory_mb=256)

    with node_killed(host, grows(host, f"{host.node}/memories")), contextlib.suppress(BuildException, SandboxException):
        build()
    build()

    assert run(start(), "cat ~/built") == "built"
    assert host.run(f"for each in {host.node}/memories/*; do [ -e $each/meta.json ] || echo $each; done") == ""


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_code_interpreter_waits_in_the_memory_of_its_template(name: str, tmp_path: Path) -> None:
    """With the server and the Python kernel that ship, not the data tools: installing those takes long here."""
    for part in ("kernel", "server"):
        subprocess.run(["cp", "-r", str(INTERPRETER / part), str(tmp_path / part)], check=True)
    (tmp_path / "share" / "kernels").mkdir(parents=True)
    subprocess.run(
        ["cp", "-r", str(INTERPRETER / "share/kernels/ipython"), str(tmp_path / "share/kernels")], check=True
    )
    for file in ("profile.sh", "start.sh"):
        subprocess.run(["cp", str(INTERPRETER / file), str(tmp_path / file)], check=True)
    wheels = tmp_path / "wheels"
    packages = ["--only-binary=:all:", "--python-version=3.11", "-c", str(_versions(tmp_path)), *SERVER]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "-d", str(wheels), *packages], check=True, timeout=600
    )
    setup = (
        "set -e; python3 -m venv /opt/interpreter/venv; cd /opt/interpreter;"
        f" venv/bin/pip install -q --no-index --find-links /opt/wheels {' '.join(SERVER)};"
        " site=$(echo venv/lib/python3*/site-packages);"
        " printf '/opt/interpreter/server\\n/opt/interpreter/kernel\\n' > $site/interpreter.pth;"
        " chown -R user:user venv"
    )
    template = Template(file_context_path=tmp_path).from_template("base").copy("wheels", "/opt/wheels", user="root")
    template = template.run_cmd(setup, user="root").copy("profile.sh", "/etc/profile.d/interpreter.sh", user="root")
    for part in ("share", "kernel", "server", "start.sh"):
        template = template.copy(part, f"/opt/interpreter/{part}", user="root")
    Template.build(
        template.set_start_cmd("/opt/interpreter/start.sh", "curl -sf http://localhost:49999/health"),
        name,
        cpu_count=1,
        memory_mb=512,
    )

    began = time.monotonic()
    sandbox = Interpreter.create(name, timeout=1800, request_timeout=PATIENCE)
    try:
        first = sandbox.run_code("x = 20; x + 1", timeout=PATIENCE, request_timeout=PATIENCE)
        seconds = time.monotonic() - began
        second = sandbox.run_code("x + 2", timeout=PATIENCE, request_timeout=PATIENCE)
        ages = run(sandbox, "ps -eo etimes,args | grep [i]pykernel || ps -eo etimes,args | grep [i]nterpreter")
    finally:
        sandbox.kill(request_timeout=PATIENCE)

    assert (first.text, second.text) == ("21", "22")
    # A kernel alone takes longer than that to start here: it came with the memory.
    oldest = max(int(line.split()[0]) for line in ages.splitlines())
    assert oldest > seconds, ages


def _versions(folder: Path) -> Path:
    """The template's pinned versions, without hashes: pip takes no constraints with them."""
    pinned = (INTERPRETER / "requirements.txt").read_text().splitlines()
    file = folder / "versions.txt"
    file.write_text("\n".join(line.split()[0] for line in pinned if "==" in line and not line.startswith(" ")))
    return file
