"""Builds when the node process ends, and the bounds of the build cache."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import grpc
import pytest

from emberbox.wire import node_pb2 as wire
from tests.support import registry as images
from tests.support.builds import build, look, read_until, request, step
from tests.support.node import NodeProcess

pytestmark = [pytest.mark.root, pytest.mark.asyncio, pytest.mark.xdist_group("node_build_life")]


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces, mounts and cgroups")


def kept(node: NodeProcess) -> list[str]:
    return sorted(path.name for path in (node.settings.node_dir / "cache/steps").iterdir())


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_what_a_build_had_begun_goes_with_the_node(how: str) -> None:
    async with NodeProcess(warm_min=0, warm_max=0) as node:
        asked = request(steps=[step("RUN", "echo done > ~/f"), step("RUN", "echo begun; sleep 600")])
        stream = node.stub.Build(asked, timeout=300)
        await read_until(stream, "begun")
        (node.settings.node_dir / "building/pull-left").mkdir()
        (node.settings.node_dir / "building/pull-left/auth-x").write_text("secret")
        (node.settings.node_dir / "layers/.draft-left").mkdir()
        (node.settings.node_dir / "cache/steps/draft-left").mkdir()

        if how == "killed":
            await node.kill_process()
        else:
            await node.stop()
        await node.start()

        follow = node.stub.FollowBuild(wire.FollowBuildRequest(build_id=asked.build_id), timeout=300)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await follow.read()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert node.traces() == []
        assert list((node.settings.node_dir / "building").iterdir()) == []
        assert list((node.settings.node_dir / "layers").glob(".*")) == []
        assert not any(name.startswith("draft-") for name in kept(node))

        told = await build(node, step("RUN", "echo done > ~/f"), step("RUN", "echo again"))

        assert told.cached == ["1"]


async def test_an_image_that_was_being_unpacked_goes_with_a_killed_node() -> None:
    if lacking := images.missing():
        pytest.skip(f"this machine lacks {lacking}")
    with images.local_registry() as registry:
        noise = await asyncio.to_thread(os.urandom, 64 << 20)
        name = registry.push("noise", [images.layer([images.File("noise", noise)])])
        async with NodeProcess(warm_min=0, warm_max=0, insecure_registries=(registry.host,)) as node:
            stream = node.stub.Build(request(from_image=name), timeout=300)
            await read_until(stream, "Unpacking the image")

            await node.kill_process()
            await node.start()

            mounted = [line for line in Path("/proc/mounts").read_text().splitlines() if str(node.data) in line]
            assert mounted == []
            assert list((node.settings.node_dir / "building").iterdir()) == []
            assert list((node.settings.node_dir / "layers").glob(".*")) == []
            await node.until(lambda: processes_in(str(node.data)) == [])


def processes_in(folder: str) -> list[str]:
    """Command lines that name a folder; but for the node's own, which has it in its environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [words] if folder in words else []
    return found


async def test_the_cache_keeps_what_was_used_last_within_its_bound() -> None:
    def written(name: str) -> wire.BuildStep:
        return step("RUN", f"head -c 8M /dev/urandom > ~/{name}")

    async with NodeProcess(warm_min=0, warm_max=0, build_cache_max_mb=20) as node:
        await build(node, written("a"))
        await build(node, written("b"))
        used = await build(node, written("a"))

        third = await build(node, written("c"))
        await asyncio.sleep(0.2)
        a, c = await build(node, written("a")), await build(node, written("c"))

        assert used.cached == a.cached == c.cached == ["1"]
        assert (await look(node, third.image, "stat -c %s c")).text == str(8 << 20)
        assert (await build(node, written("b"))).cached == []


async def test_a_layer_that_only_the_cache_stands_on_goes_with_its_entry() -> None:
    async with NodeProcess(warm_min=0, warm_max=0, build_cache_max_mb=0) as node:
        told = await build(node, step("RUN", "echo x > ~/x"))
        layer = told.image.layers[-1]
        path = node.settings.node_dir / "layers" / f"{layer}.erofs"
        while_wanted = path.exists()

        await node.stub.DeleteBuild(wire.DeleteBuildRequest(build_id=told.build_id, layers=[layer]), timeout=300)

        assert (while_wanted, path.exists()) == (True, False)
        assert kept(node) == []


async def test_a_build_may_not_take_for_ever() -> None:
    async with NodeProcess(warm_min=0, warm_max=0, build_seconds=40, ready_seconds=1) as node:
        never_ready = await build(node, start_command="sleep 100", ready_command="false")
        too_long = await build(node, step("RUN", "sleep 100"))

        assert f"did not succeed within {node.settings.time_scale:g} s" in never_ready.why("finalize")
        assert "was given up" in too_long.why("1")
        assert node.traces() == []
