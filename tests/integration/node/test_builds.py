"""Builds on a real node with containers: steps, files, the cache, start and ready commands, failures."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import grpc
import pytest

from emberbox.wire import node_pb2 as wire
from tests.support.builds import archive, build, follow, look, read_until, request, step
from tests.support.node import NodeProcess

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("node_builds")]


def leftovers(node: NodeProcess) -> list[str]:
    """What must be gone when no build runs, besides the traces of machines."""
    directory = node.settings.node_dir
    found = [*(directory / "building").iterdir(), *(directory / "layers").glob(".*")]
    found += (directory / "cache/steps").glob("draft-*")
    return [*node.traces(), *(str(path) for path in found)]


async def test_steps_run_in_order_and_what_they_set_becomes_the_templates(node: NodeProcess) -> None:
    told = await build(
        node,
        step("ENV", "GREETING", "hello"),
        step("ENV", "WHOLE", "${GREETING:-x} you"),
        step("WORKDIR", "/app/deep"),
        step("RUN", 'echo "$WHOLE" > said; pwd; id -un'),
        step("RUN", "touch /by-root", "root"),
        step("USER", "root"),
        step("RUN", "id -un; rm /etc/issue; mkdir -p /usr/share/perl5 && rm -rf /usr/share/perl5"),
    )

    output = await look(
        node,
        told.image,
        'echo "$WHOLE $(pwd) $(cat said) $(stat -c %U said /app/deep /by-root)"; ls /etc/issue /usr/share/perl5',
        user="",
    )

    assert output.text.splitlines() == [
        "hello you /app/deep hello you user",
        "user",
        "root",
        "ls: cannot access '/etc/issue': No such file or directory",
        "ls: cannot access '/usr/share/perl5': No such file or directory",
    ]
    assert told.image.default_user == "root"
    assert len(told.image.layers) == len(node.image.layers) + 1
    assert leftovers(node) == []


async def test_login_shells_have_the_templates_path(node: NodeProcess) -> None:
    told = await build(node, step("ENV", "PATH", "/opt/mine:$PATH"), step("RUN", "echo $PATH"))

    assert told.logs[-2].entry.message.startswith("/opt/mine:/usr/local/sbin:")
    assert (await look(node, told.image, "echo $PATH")).text.startswith("/opt/mine:/usr/local/sbin:")


async def test_a_user_may_be_a_number(node: NodeProcess) -> None:
    told = await build(node, step("USER", "0:0"), step("RUN", "id -un"), step("USER", "1000"), step("RUN", "id -un"))

    assert [entry.entry.message for entry in told.logs if entry.step in "24"][1::2] == ["root", "user"]
    assert (await look(node, told.image, "id -un; pwd", user="")).text.split() == ["user", "/home/user"]


async def test_output_becomes_log_lines_of_its_step(node: NodeProcess) -> None:
    told = await build(node, step("RUN", "true"), step("RUN", "echo out; echo err >&2; printf 'ü no end'"))

    lines = [(entry.entry.level, entry.entry.message) for entry in told.logs if entry.step == "2"]
    assert ("info", "out") in lines
    assert ("warn", "err") in lines
    assert ("info", "ü no end") in lines
    assert [entry.position for entry in told.logs] == list(range(len(told.logs)))


async def test_dates_of_files_are_kept(node: NodeProcess) -> None:
    told = await build(node, step("RUN", "touch -d @1600000000 ~/old; python3 -m compileall -q ~"))

    output = await look(node, told.image, "stat -c %Y ~/old")

    assert output.text == "1600000000"


async def test_an_unchanged_build_does_nothing_again(node: NodeProcess) -> None:
    steps = [step("RUN", "date +%N > ~/when"), step("USER", "root"), step("RUN", "date +%N > /root/when")]
    first = await build(node, *steps)

    second = await build(node, *steps)
    changed = await build(node, *steps[:2], step("RUN", "date > /root/when"))
    forced = await build(node, *steps[:2], step("RUN", "date +%N > /root/when", force=True))
    all_forced = await build(node, *steps, force=True)
    other_team = await build(node, *steps, team_id="other")

    assert second.image.layers == first.image.layers
    assert second.cached == ["1", "2", "3"]
    assert changed.cached == forced.cached == ["1", "2"]
    assert forced.image.layers != first.image.layers
    assert all_forced.cached == other_team.cached == []


async def test_a_cached_chain_goes_on_where_it_ended(node: NodeProcess) -> None:
    await build(node, step("RUN", "echo 1 > ~/n"), step("RUN", "echo 2 >> ~/n"))

    told = await build(node, step("RUN", "echo 1 > ~/n"), step("RUN", "echo 2 >> ~/n"), step("RUN", "echo 3 >> ~/n"))

    assert told.cached == ["1", "2"]
    assert (await look(node, told.image, "tr '\\n' ' ' < n")).text == "1 2 3"


async def test_a_build_stands_on_another(node: NodeProcess) -> None:
    base = await build(node, step("ENV", "A", "1"), step("WORKDIR", "/srv"), step("RUN", "echo below > /srv/f", "root"))

    steps = [step("ENV", "B", "$A$A"), step("RUN", "echo above >> f", "root")]
    told = await build(node, *steps, from_build=base.image)

    assert (await look(node, told.image, 'echo "$A $B $(cat f)"')).text.split() == ["1", "11", "below", "above"]
    assert len(told.image.layers) == len(base.image.layers) + 1


async def test_a_long_row_of_builds_is_packed_into_one_layer(node: NodeProcess) -> None:
    told = await build(node, step("RUN", "mkdir /srv/d && echo 0 > /srv/d/0 && rm /etc/issue", "root"))
    for number in range(1, 10):
        command = f"mv /srv/d /srv/e && mv /srv/e /srv/d && echo {number} > /srv/d/{number} && rm /srv/d/{number - 1}"
        told = await build(node, step("RUN", command, "root"), from_build=told.image)

    output = await look(
        node, told.image, "ls -A /srv /srv/d; ls /etc/issue; stat -c '%U %a' ~ /usr/bin/sudo; sudo id -u"
    )

    assert len(told.image.layers) == 1
    assert output.text.splitlines() == [
        "/srv:",
        "d",
        "",
        "/srv/d:",
        "9",
        "ls: cannot access '/etc/issue': No such file or directory",
        "user 755",
        "root 4755",
        "0",
    ]
    assert leftovers(node) == []


async def test_a_build_without_steps_adds_nothing(node: NodeProcess) -> None:
    told = await build(node, step("ENV", "A", "1"), step("USER", "root"))

    assert list(told.image.layers) == list(node.image.layers)
    assert told.image.env_vars["A"] == "1"


async def test_a_failing_command_names_its_step_and_keeps_the_steps_before(node: NodeProcess) -> None:
    told = await build(node, step("RUN", "echo fine > ~/f"), step("RUN", "echo about to fail; exit 7"))
    again = await build(node, step("RUN", "echo fine > ~/f"), step("RUN", "echo repaired"))

    why = told.why("2")
    assert "exit code 7" in why
    assert "about to fail" in why
    assert again.cached == ["1"]
    assert leftovers(node) == []


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (step("USER", "nobody-here"), "no user 'nobody-here'"),
        (step("RUN", "true", "nobody-here"), "nobody-here"),
        (step("COPY", "a", "/b", files_hash="0" * 64), "were not uploaded"),
        (step("WORKDIR", "/etc/passwd/x"), "not a folder"),
        (step("RUN", "kill -9 $$"), "was ended"),
    ],
)
async def test_a_step_that_cannot_be_done_says_why(node: NodeProcess, bad: Any, words: str, tmp_path: Path) -> None:
    told = await build(node, step("ENV", "A", "1"), bad, files_dir=str(tmp_path))

    assert words in told.why("2")
    assert leftovers(node) == []


# ---- files


async def test_files_are_copied_where_they_belong(node: NodeProcess, tmp_path: Path) -> None:
    tree = archive(
        tmp_path,
        [
            ("src/", b"", 0o755),
            ("src/a.txt", b"a", 0o644),
            ("src/run.sh", b"#!/bin/sh\n", 0o755),
            ("src/.dot", b"", 0o600),
            ("src/sub/", b"", 0o700),
            ("src/sub/b", b"b", 0o644),
        ],
        links=[("src/link", "sub/b")],
    )
    one = archive(tmp_path, [("one.txt", b"one", 0o640)])
    globbed = archive(tmp_path, [("x.py", b"x", 0o644), ("y.py", b"y", 0o644)])
    odd = archive(tmp_path, [("a b$c'd\n.txt", b"odd", 0o644)])

    told = await build(
        node,
        step("COPY", "src", "/app", files_hash=tree),
        step("COPY", "src/", "copy", "root", files_hash=tree),
        step("COPY", "one.txt", "/files/", files_hash=one),
        step("COPY", "one.txt", "/files/renamed", "root:user", "0600", files_hash=one),
        step("COPY", "one.txt", "/app", files_hash=one),
        step("COPY", "*.py", "/py", files_hash=globbed),
        step("COPY", "{x,y}.py", "/braces", files_hash=globbed),
        step("COPY", "a b$c'd\n.txt".replace("$", "\\$"), "/odd/", files_hash=odd),
        files_dir=str(tmp_path),
    )

    output = await look(
        node,
        told.image,
        "cd /; find app home/user/copy files py braces odd -printf '%P %y %m %u:%g %l\\n' | sort;"
        "cat app/a.txt app/link",
        user="root",
    )
    lines = output.text.splitlines()
    assert "a.txt f 644 user:user " in lines
    assert "run.sh f 755 root:root " in lines
    assert ".dot f 600 user:user " in lines
    assert "sub d 700 user:user " in lines
    assert "link l 777 user:user sub/b" in lines
    assert "one.txt f 640 user:user " in lines
    assert "renamed f 600 root:user " in lines
    assert lines.count("x.py f 644 user:user ") == lines.count("y.py f 644 user:user ") == 2
    assert "ab" in lines[-1]
    assert leftovers(node) == []


async def test_an_archive_cannot_write_outside_of_its_copy(node: NodeProcess, tmp_path: Path) -> None:
    evil = archive(
        tmp_path,
        [("up/../../../../etc/evil", b"x", 0o644), ("/etc/evil2", b"x", 0o644), ("good", b"x", 0o644)],
        links=[("out", "/etc")],
    )

    told = await build(node, step("COPY", ".", "/dst", files_hash=evil), files_dir=str(tmp_path))

    if told.failed is None:
        assert "No such file" in (await look(node, told.image, "ls /etc/evil")).text
    assert not Path("/etc/evil").exists()
    assert not Path("/etc/evil2").exists()
    assert leftovers(node) == []


async def test_what_is_not_a_plain_archive_is_refused(node: NodeProcess, tmp_path: Path) -> None:
    (tmp_path / f"{'1' * 64}.tar.gz").symlink_to("/etc/shadow")
    os.mkfifo(tmp_path / f"{'2' * 64}.tar.gz")
    (tmp_path / f"{'3' * 64}.tar.gz").write_bytes(b"this is no archive")
    files = str(tmp_path)

    link = await build(node, step("COPY", ".", "/x", files_hash="1" * 64), files_dir=files)
    fifo = await build(node, step("COPY", ".", "/x", files_hash="2" * 64), files_dir=files)
    damaged = await build(node, step("COPY", ".", "/x", files_hash="3" * 64), files_dir=files)

    assert "cannot be read" in link.why("1")
    assert "not a regular file" in fifo.why("1")
    assert "could not be unpacked" in damaged.why("1")


async def test_files_that_do_not_fit_say_so(node: NodeProcess, tmp_path: Path) -> None:
    large = archive(tmp_path, [("large", bytes(100 << 20), 0o644)])
    noise = archive(tmp_path, [("noise", os.urandom(80 << 20), 0o644)])

    unpacked = await build(node, step("COPY", ".", "/x", files_hash=large), files_dir=str(tmp_path), disk_size_mb=64)
    packed = await build(node, step("COPY", ".", "/x", files_hash=noise), files_dir=str(tmp_path), disk_size_mb=64)

    assert "No space left" in unpacked.why("1")
    assert "space" in packed.why("1")
    assert leftovers(node) == []


async def test_a_command_that_wants_too_much_memory_is_told(node: NodeProcess) -> None:
    told = await build(node, step("RUN", "python3 -c 'bytearray(1 << 30)'"), memory_mb=256)

    assert "ran out of its 256 MiB of memory" in told.why("1")


# ---- start and ready


async def test_a_sandbox_starts_with_the_start_command_ready(node: NodeProcess) -> None:
    told = await build(
        node,
        step("ENV", "PORT", "8123"),
        start_command='echo serving; sleep 0.5; python3 -m http.server "$PORT"',
        ready_command="curl -sf localhost:8123 >/dev/null",
    )

    output = await look(node, told.image, "curl -s -o /dev/null -w '%{http_code}' localhost:8123")

    assert output.text == "200"
    assert "serving" in told.text
    assert leftovers(node) == []


async def test_commands_that_never_make_it_ready_fail_the_build(node: NodeProcess) -> None:
    ended = await build(node, start_command="echo no; exit 3", ready_command="false")

    assert "the start command ended with exit code 3" in ended.why("finalize")
    assert leftovers(node) == []


async def test_start_and_ready_commands_are_inherited(node: NodeProcess) -> None:
    base = await build(node, start_command="touch /tmp/up; sleep 1000", ready_command="test -e /tmp/up")

    told = await build(node, step("RUN", "echo more > ~/more"), from_build=base.image)

    assert told.image.start_command == "touch /tmp/up; sleep 1000"
    assert (await look(node, told.image, "ls /tmp/up")).text == "/tmp/up"


# ---- the life of a build


async def test_a_build_goes_on_without_its_caller_and_can_be_followed(node: NodeProcess) -> None:
    asked = request(steps=[step("RUN", "for n in 1 2 3 4 5; do echo line $n; sleep 1.5; done")])
    stream = node.stub.Build(asked, timeout=300)
    seen = await read_until(stream, "line 1")
    stream.cancel()

    again = node.stub.Build(asked, timeout=300)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await again.read()
    following = wire.FollowBuildRequest(build_id=asked.build_id, from_position=len(seen))
    told = await follow(node.stub.FollowBuild(following, timeout=300), asked.build_id)

    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert [entry.position for entry in [*seen, *told.logs]] == list(range(len(seen) + len(told.logs)))
    assert told.done is not None


async def test_a_cancelled_build_leaves_nothing(node: NodeProcess) -> None:
    asked = request(steps=[step("RUN", "echo begun; sleep 600")])
    stream = node.stub.Build(asked, timeout=300)
    await read_until(stream, "begun")

    await node.stub.CancelBuild(wire.CancelBuildRequest(build_id=asked.build_id), timeout=300)
    left = leftovers(node)
    following = wire.FollowBuildRequest(build_id=asked.build_id)
    told = await follow(node.stub.FollowBuild(following, timeout=300), asked.build_id)
    stream.cancel()

    assert left == []
    assert told.why("1") == "the build was cancelled"


async def test_builds_side_by_side_do_not_disturb_each_other(node: NodeProcess) -> None:
    steps = [step("RUN", "sleep 0.2; echo same > ~/same")]

    one, two, other = await asyncio.gather(
        build(node, *steps), build(node, *steps), build(node, step("RUN", "echo other > ~/other"))
    )

    for told, name in ((one, "same"), (two, "same"), (other, "other")):
        assert (await look(node, told.image, f"cat {name}")).text == name
    assert leftovers(node) == []


async def test_a_deleted_builds_layer_goes_when_nothing_stands_on_it(node: NodeProcess) -> None:
    told = await build(node, step("RUN", "echo $RANDOM > ~/unique", force=True), force=True)
    layer = told.image.layers[-1]
    path = node.settings.node_dir / "layers" / f"{layer}.erofs"
    await asyncio.to_thread(_forget_cache, node)

    machine = await node.create(image=told.image)
    delete = wire.DeleteBuildRequest(build_id=told.build_id, layers=[layer])
    await node.stub.DeleteBuild(delete, timeout=300)
    while_used = path.exists()
    await node.stub.Kill(wire.KillRequest(sandbox_id=machine.sandbox_id), timeout=300)
    await node.stub.DeleteBuild(delete, timeout=300)

    assert (while_used, path.exists()) == (True, False)


def _forget_cache(node: NodeProcess) -> None:
    for path in (node.settings.node_dir / "cache/made").glob("*.json"):
        path.unlink()
