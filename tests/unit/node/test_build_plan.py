"""What steps mean, and the keys of what they leave."""

from __future__ import annotations

import pytest

from emberbox.node.building.model import Step, StepFailed, StepType
from emberbox.node.building.plan import BuildState, Work, base_key, chain, final_key, read_steps
from emberbox.node.errors import BadValue

START = base_key(["a" * 64], 1024, team_id="team")


def step(kind: str, *args: str, files_hash: str = "", force: bool = False) -> tuple[str, tuple[str, ...], str, bool]:
    return kind, args, files_hash, force


def planned(*steps: tuple[str, tuple[str, ...], str, bool], start: str = START, force: bool = False) -> list[Work]:
    return chain(read_steps(steps), start, BuildState(), force=force)


COPY = step("COPY", "src", "/dst", files_hash="f" * 64)


def test_the_same_steps_have_the_same_keys() -> None:
    steps = (step("RUN", "make"), COPY, step("USER", "root"))

    assert [work.key for work in planned(*steps)] == [work.key for work in planned(*steps)]


def test_a_changed_step_changes_its_key_and_those_after_it() -> None:
    before = planned(step("RUN", "a"), step("RUN", "b"), step("RUN", "c"))
    after = planned(step("RUN", "a"), step("RUN", "other"), step("RUN", "c"))

    assert [x.key == y.key for x, y in zip(before, after, strict=True)] == [True, False, False]


@pytest.mark.parametrize(
    "other",
    [
        step("COPY", "src", "/dst", files_hash="e" * 64),
        step("COPY", "src", "/other", files_hash="f" * 64),
        step("COPY", "src", "/dst/", files_hash="f" * 64),
        step("COPY", "src", "/dst", "root", files_hash="f" * 64),
        step("COPY", "src", "/dst", "", "0755", files_hash="f" * 64),
    ],
)
def test_everything_about_a_copy_is_in_its_key(other: tuple[str, tuple[str, ...], str, bool]) -> None:
    assert planned(COPY)[0].key != planned(other)[0].key


def test_variables_user_and_folder_are_in_the_keys_of_later_commands_only() -> None:
    plain = planned(step("RUN", "a"), step("RUN", "b"))

    for setting in (step("ENV", "A", "1"), step("USER", "root"), step("WORKDIR", "/x"), step("ARG", "A=1")):
        changed = planned(step("RUN", "a"), setting, step("RUN", "b"))
        assert changed[0].key == plain[0].key
        assert changed[2].key != plain[1].key


def test_teams_bases_and_disks_do_not_share_keys() -> None:
    keys = {
        base_key(["a"], 1024, team_id="one"),
        base_key(["a"], 1024, team_id="two"),
        base_key(["b"], 1024, team_id="one"),
        base_key(["a", "b"], 1024, team_id="one"),
        base_key(["a"], 2048, team_id="one"),
    }

    assert len(keys) == 5


def test_a_forced_step_forces_those_after_it() -> None:
    works = planned(step("RUN", "a"), step("RUN", "b", force=True), step("RUN", "c"))

    assert [work.forced for work in works] == [False, True, True]
    assert all(work.forced for work in planned(step("RUN", "a"), force=True))


def test_state_accumulates_and_becomes_the_templates() -> None:
    works = planned(
        step("ENV", "ROOT", "/srv", "APP", "$ROOT/app"),
        step("ENV", "APP", "${ROOT}/other", "PORT", "${UNSET:-8080}", "ONE", "${ROOT:+yes}", "MONEY", "\\$5"),
        step("WORKDIR", "$APP"),
        step("WORKDIR", "sub/../deep"),
        step("USER", "root"),
    )

    state = works[-1].after
    assert state.env == {"ROOT": "/srv", "APP": "/srv/other", "PORT": "8080", "ONE": "yes", "MONEY": "$5"}
    assert state.workdir == "/srv/other/deep"
    assert state.user == "root"


def test_variables_of_one_env_step_do_not_see_each_other() -> None:
    state = planned(step("ENV", "A", "1"), step("ENV", "A", "2", "B", "$A"))[-1].after

    assert state.env == {"A": "2", "B": "1"}


def test_the_usual_path_is_known_without_being_set() -> None:
    state = planned(step("ENV", "PATH", "/opt/bin:$PATH"))[-1].after

    assert state.env["PATH"].startswith("/opt/bin:/usr/local/sbin:")


def test_arguments_of_the_build_do_not_become_the_templates() -> None:
    works = planned(step("ARG", "VERSION=3"), step("ENV", "NAME", "app-$VERSION"), step("ARG", "OTHER", "4"))

    assert works[-1].after.env == {"NAME": "app-3"}
    assert works[-1].after.args == {"VERSION": "3", "OTHER": "4"}


@pytest.mark.parametrize(
    ("source", "target", "pattern", "place"),
    [
        ("a.txt", "/x", "a.txt", "/x"),
        ("./a/", "/x/", "a", "/x/"),
        (".", ".", ".", "/home/user/"),
        ("a/../b", "~/c", "b", "/home/user/c"),
        ("*.py", "code/", "*.py", "/home/user/code/"),
        ("a", "//etc/../srv", "a", "/srv"),
        ("a", "/", "a", "/"),
    ],
)
def test_a_copy_names_its_source_and_place(source: str, target: str, pattern: str, place: str) -> None:
    work = planned(step("COPY", source, target, files_hash="f" * 64))[0]

    expected = place if target != "." else "/home/user"
    assert work.words == (pattern, expected, "user", "")


def test_a_copy_belongs_to_the_user_of_its_step_or_of_the_build() -> None:
    works = planned(step("USER", "root"), COPY, step("COPY", "a", "/b", "app:web", "0644", files_hash="f" * 64))

    assert works[1].words[2:] == ("root", "")
    assert works[2].words[2:] == ("app:web", "0644")


@pytest.mark.parametrize("source", ["..", "../x", "a/../../x"])
def test_a_copy_from_outside_is_refused(source: str) -> None:
    with pytest.raises(StepFailed, match="outside") as caught:
        planned(step("RUN", "true"), step("COPY", source, "/x", files_hash="f" * 64))

    assert caught.value.step == "2"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (step("FROM", "x"), "unknown type"),
        (step("RUN"), "command"),
        (step("RUN", "  "), "command"),
        (step("RUN", "a", "b", "c"), "command"),
        (step("COPY", "a", "/b"), "hash"),
        (step("COPY", "a", files_hash="f" * 64), "destination"),
        (step("COPY", "a", "/b", files_hash="../../etc/passwd"), "hash"),
        (step("COPY", "a", "/b", "", "rwx", files_hash="f" * 64), "octal"),
        (step("ENV", "A"), "in turn"),
        (step("ENV", "A=B", "1"), "name of a variable"),
        (step("WORKDIR"), "exactly one"),
        (step("USER", ""), "exactly one"),
        (step("RUN", "a\0b"), "NUL"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused(bad: tuple[str, tuple[str, ...], str, bool], words: str) -> None:
    with pytest.raises(BadValue, match=f"step 2.*{words}"):
        read_steps([step("RUN", "true"), bad])


def test_steps_may_be_written_in_small_letters() -> None:
    assert read_steps([step("run", "true")]) == (Step(1, StepType.RUN, ("true",)),)


def test_the_final_key_knows_the_user_and_the_folder() -> None:
    states = [BuildState(), BuildState(user="root"), BuildState(workdir="/x")]

    assert len({final_key(START, state) for state in states}) == 3
