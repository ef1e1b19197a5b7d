"""Build plans, the queue, and the check of uploaded archives: what needs no server."""

from __future__ import annotations

import asyncio
import gzip
import io
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
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

    await asyncio.wait_for(ran.wait(), 60)


# ---- archives

MIB = 1024 * 1024


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
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_what_was_cut_off_anywhere_is_refused(length: int, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(GOOD[:length])

    with pytest.raises(Invalid):
        check_archive(tmp_path / "archive", 100_000)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "records",
    [{"size": "9" * 20}, {"size": "-5"}, {"size": "x"}],
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

    assert "a header of 67108864 bytes" in _refused_in_little_memory(tmp_path / "archive")


def test_many_headers_of_one_member_are_not_kept_in_memory(tmp_path: Path) -> None:
    records = b"".join(b"10 %05x=\n" % number for number in range(MIB // 10))
    (tmp_path / "archive").write_bytes(gzip.compress(_pax(records) * 40, compresslevel=1))

    assert "one member's may have 1048576 in all" in _refused_in_little_memory(tmp_path / "archive")


def test_global_headers_do_not_add_up_in_memory(tmp_path: Path) -> None:
    made = io.BytesIO()
    with gzip.GzipFile(fileobj=made, mode="wb", compresslevel=1) as archive:
        for turn in range(40):
            archive.write(
                _pax(b"".join(b"31 key%07d=%016d\n" % (turn * 5000 + n, n) for n in range(5000)), tarfile.XGLTYPE)
            )
            archive.write(_archive(_member(str(turn)))[: tarfile.BLOCKSIZE])
        archive.write(_archive())
    (tmp_path / "archive").write_bytes(made.getvalue())

    with _little_memory():
        check_archive(tmp_path / "archive", 10**9)


@pytest.mark.parametrize("record", [b"10 path=x\n", b"14 linkpath=x\n", b"9 size=7\n"])
def test_a_global_header_may_not_name_or_size_every_member(record: bytes, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(_pax(record, tarfile.XGLTYPE) + _archive(_member("a")))

    with pytest.raises(Invalid, match=r"global header that sets (path|linkpath|size)"):
        check_archive(tmp_path / "archive", 100_000)


@pytest.mark.timeout(300)
def test_a_sparse_file_of_the_old_kind_is_refused_before_its_map_is_read(tmp_path: Path) -> None:
    header = bytearray(_member("holes", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    header[482] = 1
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]  # type: ignore[attr-defined]
    block = b"%011o\0" % 1 * 42 + b"\1".ljust(8, b"\0")
    (tmp_path / "archive").write_bytes(gzip.compress(bytes(header) + block * 100_000, compresslevel=1))

    assert "a sparse file 'holes', which is not accepted" in _refused_in_little_memory(tmp_path / "archive")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "records",
    [
        {"GNU.sparse.size": "1", "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "1"},
        {"GNU.sparse.map": "0,1," * 100_000 + "0,1"},
        {"path": "GNUSparseFile.0/x", "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "holes"},
    ],
    ids=["0.0", "0.1", "1.0"],
)
def test_sparse_files_in_pax_headers_are_refused(records: dict[str, str], tmp_path: Path) -> None:
    member = _member("holes")
    member.pax_headers = {"path": "holes", **records}
    map_of_1_0 = b"9" * 9 + b"\n" + b"1\n" * (4 * MIB)
    (tmp_path / "archive").write_bytes(gzip.compress(member.tobuf() + map_of_1_0))

    assert "a sparse file 'holes', which is not accepted" in _refused_in_little_memory(tmp_path / "archive")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_thousands_of_headers_in_a_row_are_refused(kind: bytes, tmp_path: Path) -> None:
    header = _member("a", kind).tobuf()
    (tmp_path / "archive").write_bytes(gzip.compress(header * 5000 + _archive(_member("a"))))

    with pytest.raises(Invalid, match="too many headers in a row"):
        check_archive(tmp_path / "archive", 10**9)


@pytest.mark.timeout(300)
def test_a_record_of_many_digits_is_checked_at_once(tmp_path: Path) -> None:
    digits = b"1" * (MIB - 20)
    record = b"%d comment=%s\n" % (len(digits) + 17, digits)
    (tmp_path / "archive").write_bytes(_pax(record) + _archive(_member("a")))

    check_archive(tmp_path / "archive", 10**9)


@pytest.mark.parametrize(
    "records", [b"1" * 600, b"9 path=ab", b"0 path=a\n", b"99 path=a\n", b"7 path\n", b"-9 path=a\n", b" path=a\n"]
)
def test_malformed_records_are_refused(records: bytes, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(_pax(records) + _archive(_member("a")))

    with pytest.raises(Invalid, match="is damaged: a pax header is malformed"):
        check_archive(tmp_path / "archive", 100_000)


def test_names_links_and_sizes_in_records_are_those_that_count(tmp_path: Path) -> None:
    long = "ä" * 300
    fine = _archive(_member(long, size=2000), _member("b", tarfile.SYMTYPE, linkname=long), _member("c", size=10))
    sized = _pax(b"13 size=2000\n") + _archive(_member("a"))[: tarfile.BLOCKSIZE] + b"x" * 2048
    (tmp_path / "fine").write_bytes(sized + fine)
    (tmp_path / "outside").write_bytes(_pax(b"13 path=../a\n") + fine)
    (tmp_path / "taken-back").write_bytes(_pax(b"10 path=a\n8 path=\n") + _archive(_member("../b")))
    (tmp_path / "cut").write_bytes(_pax(b"10 path=a\n"))

    check_archive(tmp_path / "fine", 100_000)
    with pytest.raises(Invalid, match=r"'\.\./a' lies outside"):
        check_archive(tmp_path / "outside", 100_000)
    with pytest.raises(Invalid, match=r"'\.\./b' lies outside"):
        check_archive(tmp_path / "taken-back", 100_000)
    with pytest.raises(Invalid, match="is damaged"):
        check_archive(tmp_path / "cut", 100_000)


def _pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A pax header with these bytes as its records."""
    header = _member("pax", kind, size=len(records)).tobuf(tarfile.USTAR_FORMAT)
    return header + records + bytes(-len(records) % tarfile.BLOCKSIZE)


@contextmanager
def _little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * MIB


def _refused_in_little_memory(archive: Path) -> str:
    """What the check says that refuses an archive."""
    with _little_memory(), pytest.raises(Invalid) as refused:
        check_archive(archive, 10**9)
    return refused.value.message


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
