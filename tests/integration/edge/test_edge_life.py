"""Nothing is lost: the edge and its HAProxy are killed, reloaded and restarted, and every route is still there."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest

from emberbox.edge.main import end_leftover
from tests.support.edge import DOMAIN, EdgeProcess, Exchange, eventually, headers_for, make_certificate


async def _tell_then_wait(exchange: Exchange) -> None:
    await exchange.begin_chunks()
    await exchange.chunk(b"first")
    await exchange.reader.read(1)


async def _reached(world: Any, sandbox_id: str) -> str | None:
    """The machine that answers for a sandbox, or None. On a connection of its own."""
    try:
        async with httpx.AsyncClient(base_url=world.edge.url, timeout=30, trust_env=False) as client:
            answer = await client.get("/", headers=headers_for(sandbox_id))
    except httpx.TransportError:
        return None
    return str(answer.json().get("machine"))


async def _until_reached(world: Any, sandbox_id: str, address: str) -> None:
    for _ in range(1200):
        if await _reached(world, sandbox_id) == address:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{sandbox_id} is not reached:\n{world.edge.log.read_text()}")


@pytest.mark.parametrize("which", ["worker", "master"])
async def test_a_killed_haproxy_comes_back_with_every_route(own_world: Any, which: str) -> None:
    world = own_world
    sandboxes = [await world.sandbox(8080) for _ in range(20)]
    master, workers = world.edge.master(), world.edge.workers()

    os.kill(master if which == "master" else workers[0], signal.SIGKILL)

    # What the killed one left may serve for another moment.
    await eventually(lambda: not {master, *workers} & world.edge.haproxies().keys())
    for sandbox_id, machine in sandboxes:
        await _until_reached(world, sandbox_id, machine.address)
    assert world.edge.master() != master
    await eventually(lambda: len(world.edge.haproxies()) == 2)
    assert world.control.questions == []


async def test_a_change_while_haproxy_is_dead_is_not_lost(own_world: Any) -> None:
    world = own_world
    dropped_id, _ = await world.sandbox(8080)
    machine = await world.machine(8080)
    added_id = world.new_id()
    os.kill(world.edge.workers()[0], signal.SIGKILL)

    await world.routes.set(added_id, machine.address)
    await world.routes.drop(dropped_id)

    await _until_reached(world, added_id, machine.address)
    assert await _reached(world, dropped_id) == "None"


async def test_a_killed_edge_cuts_no_stream_and_the_next_takes_over(own_world: Any) -> None:
    world = own_world
    go_on = asyncio.Event()

    async def in_two_parts(exchange: Exchange) -> None:
        await exchange.begin_chunks()
        await exchange.chunk(b"1")
        await go_on.wait()
        await exchange.chunk(b"2")
        await exchange.chunk(b"")

    sandbox_id, machine = await world.sandbox(8080)
    await machine.listen(8081, in_two_parts)
    before = world.edge.haproxies()

    async with world.client.stream("GET", "/", headers=headers_for(sandbox_id, 8081)) as answer:
        parts = answer.aiter_raw()
        await anext(parts)
        world.edge.kill()
        orphaned = await _reached(world, sandbox_id)
        world.edge.start()
        go_on.set()
        rest = [part async for part in parts]

    assert rest == [b"2"]
    assert orphaned == machine.address
    assert world.edge.haproxies().keys() == before.keys()
    assert await _reached(world, sandbox_id) == machine.address


async def test_the_next_edge_can_end_what_the_one_before_let_in(own_world: Any) -> None:
    world = own_world
    sandbox_id, machine = world.new_id(), await world.machine(9)
    await machine.listen(8080, _tell_then_wait)
    await world.routes.set(sandbox_id, machine.address)

    async with world.client.stream("GET", "/", headers=headers_for(sandbox_id)) as answer:
        parts = answer.aiter_raw()
        await anext(parts)
        world.edge.kill()
        world.edge.start()
        await world.routes.drop(sandbox_id)
        with pytest.raises(httpx.RemoteProtocolError):
            await asyncio.wait_for(anext(parts), 60)


async def test_haproxy_killed_while_no_edge_runs_comes_back_with_the_next(own_world: Any) -> None:
    world = own_world
    sandbox_id, machine = await world.sandbox(8080)
    world.edge.kill()
    os.kill(world.edge.master(), signal.SIGKILL)
    await eventually(lambda: not world.edge.haproxies())

    world.edge.start()

    assert await _reached(world, sandbox_id) == machine.address


async def test_a_haproxy_that_hangs_is_replaced_by_the_next_edge(own_world: Any) -> None:
    world = own_world
    sandbox_id, machine = await world.sandbox(8080)
    master, worker = world.edge.master(), world.edge.workers()[0]
    world.edge.kill()
    os.kill(worker, signal.SIGSTOP)
    os.kill(master, signal.SIGSTOP)

    world.edge.start()

    await _until_reached(world, sandbox_id, machine.address)
    os.kill(worker, signal.SIGCONT)
    await eventually(lambda: not {master, worker} & world.edge.haproxies().keys())


async def test_a_reload_loses_no_route_and_cuts_no_stream(own_world: Any) -> None:
    world = own_world
    sandbox_id, machine = await world.sandbox(8080)
    await machine.listen(8081, _tell_then_wait)
    before = world.edge.workers()

    async with world.client.stream("GET", "/", headers=headers_for(sandbox_id, 8081)) as answer:
        parts = answer.aiter_raw()
        await anext(parts)
        world.edge.signal(signal.SIGHUP)
        await eventually(lambda: "edge.reloaded" in world.edge.log.read_text())
        reached = await _reached(world, sandbox_id)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waiting := asyncio.ensure_future(anext(parts))), 1)
        both = world.edge.workers()
        await world.routes.drop(sandbox_id)
        with pytest.raises(httpx.RemoteProtocolError):
            await asyncio.wait_for(waiting, 60)

    assert reached == machine.address
    assert len(both) == 2
    assert set(before) < set(both)
    await eventually(lambda: len(world.edge.workers()) == 1)


async def test_routes_change_during_reloads_without_loss(own_world: Any) -> None:
    world = own_world
    machine = await world.machine(8080)
    ids = [world.new_id() for _ in range(60)]

    for number, sandbox_id in enumerate(ids):
        if number % 20 == 0:
            world.edge.signal(signal.SIGHUP)
        await world.routes.set(sandbox_id, machine.address)

    reached = [await _reached(world, sandbox_id) for sandbox_id in ids]
    assert reached == [machine.address] * len(ids)


async def test_sigterm_ends_the_edge_and_its_haproxy(own_world: Any) -> None:
    world = own_world
    sandbox_id, machine = await world.sandbox(8080)

    code = world.edge.stop()

    assert code == 0
    assert world.edge.haproxies() == {}
    assert not (world.edge.settings.edge_dir / "haproxy.pid").exists()
    world.edge.start()
    assert await _reached(world, sandbox_id) == machine.address


async def test_two_edges_on_one_directory_are_refused(own_world: Any) -> None:
    world = own_world
    before = world.edge.haproxies()
    second = EdgeProcess()
    second.remove_home()
    second.settings, second.log = world.edge.settings, world.edge.home / "second.log"

    second.launch()

    await eventually(lambda: second.process is not None and second.process.poll() is not None)
    assert second.process is not None
    assert second.process.returncode == 1
    assert "another edge runs" in second.log.read_text()
    assert world.edge.haproxies() == before


async def test_new_settings_are_taken_up_by_the_next_edge_without_cutting_a_stream(own_world: Any) -> None:
    world = own_world
    sandbox_id, machine = world.new_id(), await world.machine(9)
    await machine.listen(8080, _tell_then_wait)
    await world.routes.set(sandbox_id, machine.address)

    async with world.client.stream("GET", "/", headers=headers_for(sandbox_id)) as answer:
        parts = answer.aiter_raw()
        await anext(parts)
        world.edge.kill()
        world.edge.settings = world.edge.settings.model_copy(update={"connections_per_sandbox": 1})
        world.edge.start()
        async with world.client.stream("GET", "/", headers=headers_for(sandbox_id)) as second:
            refused = await world.client.get("/", headers=headers_for(sandbox_id))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(parts), 1)

    assert (second.status_code, refused.status_code) == (200, 429)


async def test_a_renewed_certificate_is_served_after_a_reload(new_world: Any, tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, f"*.{DOMAIN}")
    world = await new_world(tls_cert=cert, tls_key=key)

    def served() -> str:
        return ssl.get_server_certificate((world.edge.address, world.edge.settings.edge_tls_port))

    before = await asyncio.to_thread(served)
    make_certificate(tmp_path, f"*.{DOMAIN}")
    world.edge.signal(signal.SIGHUP)
    await eventually(lambda: "edge.reloaded" in world.edge.log.read_text())

    for _ in range(100):  # a worker that was replaced may take a last connection
        after = await asyncio.to_thread(served)
        if after != before:
            break
        await asyncio.sleep(0.1)
    assert after.split() == cert.read_text().split()


async def test_a_certificate_without_its_key_is_refused_in_words(new_world: Any, tmp_path: Path) -> None:
    cert, _ = make_certificate(tmp_path, f"*.{DOMAIN}")

    with pytest.raises(RuntimeError, match="needs both a certificate and its key"):
        await new_world(tls_cert=cert)


async def test_an_edge_that_cannot_serve_ends_the_haproxy_of_the_last_one(own_world: Any) -> None:
    """Its routes would stay, and lead to whoever has their addresses by then."""
    world = own_world
    await world.sandbox(8080)
    assert world.edge.process is not None
    world.edge.process.kill()
    world.edge.process.wait()
    left = world.edge.haproxies()
    world.edge.settings = world.edge.settings.model_copy(update={"tls_cert": world.edge.home / "missing.pem"})

    world.edge.launch()
    code = await asyncio.to_thread(world.edge.process.wait, 60)

    assert left
    assert code == 1
    await eventually(lambda: not world.edge.haproxies())


async def test_replacing_all_routes_drops_the_others_and_keeps_what_stays(own_world: Any) -> None:
    world = own_world
    kept_id, kept = await world.sandbox(8080)
    await kept.listen(8081, _tell_then_wait)
    gone_id, gone = await world.sandbox(8080)
    await gone.listen(8081, _tell_then_wait)
    new_id, new = world.new_id(), await world.machine(8080)

    async with (
        world.client.stream("GET", "/", headers=headers_for(kept_id, 8081)) as kept_answer,
        world.client.stream("GET", "/", headers=headers_for(gone_id, 8081)) as gone_answer,
    ):
        kept_parts, gone_parts = kept_answer.aiter_raw(), gone_answer.aiter_raw()
        await anext(kept_parts)
        await anext(gone_parts)
        await world.routes.replace({kept_id: kept.address, new_id: new.address})
        with pytest.raises(httpx.RemoteProtocolError):
            await asyncio.wait_for(anext(gone_parts), 60)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(kept_parts), 1)

    reached = [await _reached(world, sandbox_id) for sandbox_id in (kept_id, gone_id, new_id)]
    assert reached == [kept.address, "None", new.address]


async def test_more_sandboxes_than_lanes_are_all_served(own_world: Any) -> None:
    """The pool of lanes doubles by a reload; 1024 are there at first."""
    world = own_world
    machine = await world.machine(8080)
    ids = [world.new_id() for _ in range(1100)]

    await world.routes.replace(dict.fromkeys(ids[:1020], machine.address))
    for sandbox_id in ids[1020:1030]:
        await world.routes.set(sandbox_id, machine.address)
    await world.routes.replace(dict.fromkeys(ids, machine.address))

    reached = {await _reached(world, sandbox_id) for sandbox_id in (*ids[:5], *ids[1020:1030], *ids[-5:])}
    assert reached == {machine.address}


async def test_swapped_addresses_never_reach_the_wrong_machine(own_world: Any) -> None:
    """Idle connections are kept for reuse, but a connection belongs to an address and a sandbox."""
    world = own_world
    first_id, first = await world.sandbox(8080)
    second_id, second = await world.sandbox(8080)
    wrong: list[str] = []
    asked = 0

    for _ in range(20):
        for sandbox_id, machine in ((first_id, first), (second_id, second)):
            answers = await asyncio.gather(
                *(world.client.get("/", headers=headers_for(sandbox_id)) for _ in range(8)),
                world.client.post("/", content=b"x", headers=headers_for(sandbox_id)),
            )
            asked += len(answers)
            wrong += [answer.text for answer in answers if answer.json().get("machine") != machine.address]
        first, second = second, first
        await world.routes.set(first_id, first.address)
        await world.routes.set(second_id, second.address)

    assert asked == 360
    assert wrong == []


async def test_an_address_that_is_given_to_another_sandbox_serves_that_one(own_world: Any) -> None:
    world = own_world
    old_id, old = await world.sandbox(8080)
    await asyncio.gather(*(world.client.get("/", headers=headers_for(old_id)) for _ in range(20)))
    await world.routes.drop(old_id)
    await old.close()
    new_id, new = world.new_id(), type(old)(old.address)
    world.machines.append(new)
    await new.listen(8080)

    await world.routes.set(new_id, new.address)

    answers = await asyncio.gather(*(world.client.post("/", headers=headers_for(new_id)) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(new.seen) == 20


async def test_what_a_killed_edge_left_can_be_ended(own_world: Any) -> None:
    world = own_world
    of_a_running_edge = end_leftover(world.edge.settings)
    world.edge.kill()

    found = end_leftover(world.edge.settings)

    await eventually(lambda: not world.edge.haproxies())
    assert not of_a_running_edge
    assert found
    assert not end_leftover(world.edge.settings)
