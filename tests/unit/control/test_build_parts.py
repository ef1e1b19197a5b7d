"""Build plans, the queue, and the check of uploaded archives: what needs no server."""

from __future__ import annotations

import asyncio
import gzip
import io
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emberbox.control.build_plan import BuildPlan, Step, own_template
from emberbox.control.build_queue import BuildQueue
from emberbox.control.errors import Invalid, TooMany
from emberbox.control.uploads import check_archive
from emberbox.wire import node_pb2 as pb

# ---- plans


def test_a_plan_is_stored_without_credentials() -> None:
    credentials = pb.RegistryCredentials(kind="registry", username="me", password="hidden-word")
    plan = BuildPlan("debian", "", (Step("COPY", ("a", "b"), "ab" * 32, True),), "serve", "true", True, credentials)

    stored = plan.stored()

    assert "hidden-word" not in repr(stored) + repr(plan)
    assert stored["registry"] == "registry"
    assert BuildPlan.from_stored(stored) == plan


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("e2bdev/base", "base"),
        ("e2bdev/base:latest", "base"),
        ("docker.io/e2bdev/code-interpreter", "code-interpreter-v1"),
        ("e2bdev/base:v1", None),
        ("ghcr.io/e2bdev/base", None),
        ("debian", None),
    ],
)
def test_the_shipped_templates_stand_for_their_images(image: str, name: str | None) -> None:
    assert own_template(image) == name


# ---- the queue


@given(teams=st.lists(st.sampled_from("abc"), max_size=30), at_once=st.integers(1, 4), per_team=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_every_build_has_its_turn_and_no_limit_is_exceeded(teams: list[str], at_once: int, per_team: int) -> None:
    async def run() -> tuple[list[int], int, int]:
        queue = BuildQueue(at_once=at_once, per_team=per_team, waiting_per_team=100)
        running: Counter[str] = Counter()
        done: list[int] = []
        most = most_of_a_team = 0

        async def work(number: int, team: str) -> None:
            nonlocal most, most_of_a_team
            running[team] += 1
            most, most_of_a_team = max(most, running.total()), max(most_of_a_team, running[team])
            for _ in range(number % 3 + 1):
                await asyncio.sleep(0)
            running[team] -= 1
            done.append(number)

        for number, team in enumerate(teams):
            queue.add(str(number), team, lambda number=number, team=team: work(number, team))  # type: ignore[misc]
        while queue.build_ids():
            await asyncio.sleep(0)
        return done, most, most_of_a_team

    done, most, most_of_a_team = asyncio.run(run())

    assert sorted(done) == list(range(len(teams)))
    assert most <= at_once
    assert most_of_a_team <= per_team


async def test_a_team_may_not_fill_the_queue() -> None:
    queue = BuildQueue(at_once=1, per_team=1, waiting_per_team=1)
    hold = asyncio.Event()

    async def work() -> None:
        await hold.wait()

    queue.add("1", "a", work)
    queue.add("2", "a", work)
    with pytest.raises(TooMany, match="waiting already"):
        queue.check_room("a")
    queue.check_room("b")
    await queue.remove("2")
    queue.check_room("a")
    await queue.close()

    assert queue.build_ids() == set()


async def test_work_that_breaks_gives_its_place_to_the_next() -> None:
    queue = BuildQueue(at_once=1, per_team=1, waiting_per_team=1)
    ran = asyncio.Event()

    async def breaks() -> None:
        raise RuntimeError("a fault")

    async def works() -> None:
        ran.set()

    queue.add("1", "a", breaks)
    queue.add("2", "a", works)

    await asyncio.wait_for(ran.wait(), 5)


# ---- archives


def _archive(*members: tarfile.TarInfo) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return made.getvalue()


def _member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, linkname: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, size, linkname
    return member


GOOD = gzip.compress(
    _archive(_member("a", tarfile.DIRTYPE), _member("a/b", size=3000), _member("c", tarfile.SYMTYPE, linkname="/x"))
)


def test_files_directories_and_links_are_taken(tmp_path: Path) -> None:
    for data in (GOOD, gzip.decompress(GOOD)):
        (tmp_path / "archive").write_bytes(data)
        check_archive(tmp_path / "archive", 100_000)


@given(length=st.integers(0, len(GOOD) - 1))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_cut_off_anywhere_is_refused(length: int, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(GOOD[:length])

    with pytest.raises(Invalid):
        check_archive(tmp_path / "archive", 100_000)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "records",
    [{"size": "9" * 20}, {"size": "-5"}, {"GNU.sparse.size": "x"}, {"GNU.sparse.map": "0,x"}],
    ids=lambda records: str(*records.items()),
)
def test_numbers_in_headers_that_cannot_be_are_refused_at_once(records: dict[str, str], tmp_path: Path) -> None:
    member = _member("a", size=10)
    member.pax_headers = records
    (tmp_path / "archive").write_bytes(_archive(member))

    with pytest.raises(Invalid, match=r"the limit|is damaged"):
        check_archive(tmp_path / "archive", 100_000)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_of_megabytes_is_not_read_into_memory(kind: bytes, tmp_path: Path) -> None:
    long = _member("long", kind, size=64 * 1024 * 1024)
    (tmp_path / "archive").write_bytes(gzip.compress(_archive(long), compresslevel=1))

    tracemalloc.start()
    try:
        with pytest.raises(Invalid, match="a header of 67108864 bytes"):
            check_archive(tmp_path / "archive", 10**9)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 16 * 1024 * 1024


@pytest.mark.parametrize(
    "member",
    [
        _member("/etc/passwd"),
        _member("a/../../b"),
        _member("..", tarfile.DIRTYPE),
        _member("device", tarfile.CHRTYPE),
        _member("pipe", tarfile.FIFOTYPE),
        _member("hard", tarfile.LNKTYPE, linkname="../outside"),
        _member("hard", tarfile.LNKTYPE, linkname="/etc/shadow"),
    ],
    ids=lambda member: member.name,
)
def test_members_that_lead_outside_or_are_no_files_are_refused(member: tarfile.TarInfo, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(gzip.compress(_archive(_member("fine"), member)))

    with pytest.raises(Invalid, match=r"member|hard link"):
        check_archive(tmp_path / "archive", 100_000)
