"""Names, limits, tokens, pages, network settings: what needs no server."""

from __future__ import annotations

import os
import stat
import threading
from difflib import SequenceMatcher
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError

from emberbox.api import paging
from emberbox.api.sandboxes import _metadata
from emberbox.control.errors import ControlError, Invalid, TooMany
from emberbox.control.limits import RateLimits
from emberbox.control.names import check_tag, did_you_mean, parse_ref
from emberbox.control.network import check_network, node_network, without_secrets
from emberbox.control.tokens import SandboxTokens, new_sandbox_id, new_secret
from emberbox.store.engine import Store
from emberbox.store.errors import StoreMisconfigured, rows_collide
from emberbox.store.migrate import HEAD, migrate, revision
from emberbox.store.records import TeamRecord

PART = st.text("abcdefghijklmnopqrstuvwxyz0123456789_-", min_size=1, max_size=20)


# ---- names


@given(namespace=st.none() | PART, name=PART, tag=st.none() | PART)
def test_a_reference_is_read_as_it_is_written(namespace: str | None, name: str, tag: str | None) -> None:
    text = (f"{namespace}/" if namespace else "") + name + (f":{tag}" if tag else "")

    ref = parse_ref(text)

    assert (ref.namespace, ref.name, ref.tag) == (namespace, name, tag)
    assert str(ref) == text


@given(st.text())
def test_any_text_is_a_reference_or_refused(text: str) -> None:
    try:
        ref = parse_ref(text)
    except Invalid:
        return
    assert parse_ref(str(ref)) == ref


@pytest.mark.parametrize("text", ["", ":", "/", "a/", "/a", "a:", "a b", "a/b/c", "ä", "a\0"])
def test_what_is_not_a_name_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="not a template name"):
        parse_ref(text)


def test_tags_have_no_case() -> None:
    assert check_tag(" V1.0 ") == "v1.0"


def test_a_suggestion_needs_something_close() -> None:
    assert did_you_mean("bse", ["base", "desktop"]) == "; did you mean 'base'?"
    assert did_you_mean("zzz", ["base"]) == ""


def test_a_suggestion_is_found_among_many_names() -> None:
    names = [f"template-of-somebody-{number}" for number in range(1000)]

    assert did_you_mean("my-servce", [*names, "my-service"]) == "; did you mean 'my-service'?"


@pytest.mark.parametrize("length", [40, 41, 128])
def test_a_suggestion_costs_little_whatever_the_names_are(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    find = SequenceMatcher.find_longest_match

    def counted(self: SequenceMatcher[str], alo: int, ahi: int, blo: int, bhi: int) -> object:
        nonlocal compared
        compared += (ahi - alo) * (bhi - blo)
        return find(self, alo, ahi, blo, bhi)

    monkeypatch.setattr(SequenceMatcher, "find_longest_match", counted)
    chance = Random(1)
    names = ["".join(chance.choices("ab", k=length)) for _ in range(1001)]

    did_you_mean(names[0], names[1:])

    assert compared < 100_000  # of characters with characters; about 10 ms


# ---- limits


def team(**limits: int) -> TeamRecord:
    values = {"rate_per_second": 2, "rate_burst": 3, "max_sandboxes": 1, "max_timeout_seconds": 60, **limits}
    return TeamRecord(id="t", name="T", slug="t", is_default=True, created_at=0, **values)


def test_a_burst_is_allowed_then_the_rate() -> None:
    now = 100.0
    rates = RateLimits(clock=lambda: now)
    for _ in range(3):
        rates.take(team())
    with pytest.raises(TooMany) as refused:
        rates.take(team())
    now = 100.5

    rates.take(team())

    assert refused.value.retry_after == 1
    with pytest.raises(TooMany):
        rates.take(team())


@given(st.lists(st.floats(0, 10), max_size=50))
def test_no_more_than_the_burst_and_the_rate_pass(pauses: list[float]) -> None:
    now = 0.0
    rates = RateLimits(clock=lambda: now)
    passed = 0
    for pause in pauses:
        now += pause
        try:
            rates.take(team())
            passed += 1
        except TooMany:
            continue

    assert passed <= 3 + 2 * now + 1e-6


def test_without_a_rate_there_is_no_limit() -> None:
    rates = RateLimits(clock=lambda: 0.0)

    for _ in range(1000):
        rates.take(team(rate_per_second=0))


# ---- tokens


def test_a_key_has_the_format_that_clients_check() -> None:
    made = new_secret("e2b_")

    assert made.value.startswith("e2b_")
    assert len(made.value) == 44
    assert int(made.value[4:], 16) >= 0
    assert made.value not in made.hash


def test_sandbox_ids_are_host_labels_without_a_dash() -> None:
    ids = {new_sandbox_id() for _ in range(1000)}

    assert len(ids) == 1000
    assert all(one.isalnum() and one.islower() and len(one) == 20 and one[0] == "i" for one in ids)


def test_tokens_come_from_the_key_the_purpose_and_the_sandbox(tmp_path: Path) -> None:
    one, same = SandboxTokens.load(tmp_path / "key"), SandboxTokens.load(tmp_path / "key")
    other = SandboxTokens.load(tmp_path / "other")

    assert one.agent("i1") == same.agent("i1")
    assert len({one.agent("i1"), one.agent("i2"), one.traffic("i1"), other.agent("i1")}) == 4
    assert stat.S_IMODE(os.stat(tmp_path / "key").st_mode) == 0o600


def test_processes_that_start_at_once_agree_on_the_key(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(SandboxTokens.load(tmp_path / "key").agent("i1")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 8
    assert len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_damaged_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"short")

    with pytest.raises(ValueError, match="restore it"):
        SandboxTokens.load(tmp_path / "key")


# ---- pages


@given(st.integers(0, 2**53 - 1), st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_a_position_survives_its_token(number: int, text: str) -> None:
    assert paging.decode(paging.encode((number, text))) == (number, text)


@given(st.text())
def test_any_token_is_a_position_or_refused(token: str) -> None:
    try:
        position = paging.decode(token)
    except Invalid:
        return
    assert position is None or isinstance(position[0], int)


def test_metadata_is_understood_encoded_once_or_twice() -> None:
    assert _metadata("a=x%2520y&b=%2526") == (("a", "x y"), ("b", "&"))
    assert _metadata("a=x%20y") == (("a", "x y"),)
    assert _metadata("a=") == (("a", ""),)


# ---- network


@given(st.lists(st.ip_addresses().map(str), max_size=5))
def test_every_address_may_be_allowed_and_denied(addresses: list[str]) -> None:
    check_network({"allowOut": addresses, "denyOut": [f"{address}" for address in addresses]})


@given(st.text(max_size=50))
def test_any_text_in_a_network_is_taken_or_refused_as_invalid(text: str) -> None:
    for settings in (
        {"allowOut": [text], "denyOut": ["0.0.0.0/0"]},
        {"denyOut": [text]},
        {"dnsServers": [text]},
        {"maskRequestHost": text},
        {"egressProxy": {"address": text}},
        {"rules": {text: []}},
    ):
        try:
            check_network(settings)
        except Invalid:
            continue
        node_network(settings, allow_internet=None)


def test_a_proxys_password_goes_to_the_node_and_nowhere_else() -> None:
    network = {"egressProxy": {"address": "p:1", "username": "u", "password": "secret"}, "rules": None}

    assert without_secrets(network) == {"egressProxy": {"address": "p:1", "username": "u"}}
    assert node_network(network, allow_internet=None).egress_proxy.password == "secret"


def test_internet_access_is_on_unless_switched_off() -> None:
    assert node_network({}, allow_internet=None).allow_internet
    assert node_network({}, allow_internet=True).allow_internet
    assert not node_network({}, allow_internet=False).allow_internet


# ---- the store


async def test_a_new_database_gets_the_tables_as_the_code_has_them(tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    from emberbox.store.tables import metadata

    store = Store(f"sqlite:///{tmp_path}/a.db")
    try:
        assert await revision(store) is None
        assert await migrate(store)
        assert not await migrate(store)
        assert await revision(store) == HEAD
        async with store.write() as connection:
            differences = await connection.run_sync(
                lambda sync: compare_metadata(MigrationContext.configure(sync), metadata)
            )
    finally:
        await store.close()

    assert differences == []
    scripts = ScriptDirectory(str(Path(__file__).parents[3] / "src/emberbox/store/migrations"))
    assert scripts.get_current_head() == HEAD


def test_a_database_of_another_kind_is_refused() -> None:
    with pytest.raises(StoreMisconfigured, match="sqlite"):
        Store("mysql://localhost/x")


def test_every_error_says_whether_a_retry_may_help() -> None:
    kinds = ControlError.__subclasses__()

    assert len({kind.status for kind in kinds}) >= 10
    assert {kind.status for kind in kinds if kind.should_retry} == {429, 503, 504}


# ---- what the store refuses


@pytest.mark.parametrize(
    ("row", "collides"),
    [
        ("1, 2, 1, 1", True),
        ("2, 1, 1, 1", True),
        ("2, 2, 3, 1", True),
        ("2, 2, 1, NULL", False),
        ("2, 2, 1, 0", False),
    ],
    ids=["primary key", "unique", "foreign key", "not null", "check"],
)
def test_a_row_collides_with_others_and_not_with_its_own_rules(row: str, *, collides: bool) -> None:
    with create_engine("sqlite://").connect() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys=ON")
        connection.exec_driver_sql(
            "CREATE TABLE t (id INTEGER PRIMARY KEY, one INT UNIQUE, of INT REFERENCES t, c INT NOT NULL CHECK (c))"
        )
        connection.exec_driver_sql("INSERT INTO t VALUES (1, 1, 1, 1)")

        with pytest.raises(IntegrityError) as refused:
            connection.exec_driver_sql(f"INSERT INTO t VALUES ({row})")

    assert rows_collide(refused.value) == collides
