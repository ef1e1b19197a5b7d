"""What must be covered and bound so that an unprivileged user reaches the trees it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from emberbox.cli.launch import Account, LaunchFailed, Tree, environment, plan

STRANGER = Account("stranger", uid=54321, gid=54321)


@pytest.fixture
def open_dir(tmp_path: Path) -> Path:
    """A directory that everybody can enter, however pytest's own are set."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory == Path("/tmp") or not directory.stat().st_mode & 0o001:
            if directory != Path("/tmp"):
                directory.chmod(0o755)
        else:
            break
    return tmp_path


def test_trees_in_reach_need_nothing(open_dir: Path) -> None:
    tree = open_dir / "code"
    tree.mkdir()

    wanted = plan(STRANGER, [Tree(tree)])

    assert wanted.covers == ()
    assert wanted.binds == ()


def test_the_first_closed_directory_is_covered_and_the_tree_bound_below_it(open_dir: Path) -> None:
    tree = open_dir / "closed" / "inner" / "code"
    tree.mkdir(parents=True)
    (open_dir / "closed").chmod(0o700)
    (open_dir / "closed/inner").chmod(0o700)

    wanted = plan(STRANGER, [Tree(tree)])

    assert wanted.covers == (open_dir / "closed",)
    assert [bind.path for bind in wanted.binds] == [tree]


def test_a_directory_that_can_be_entered_but_not_listed_is_no_obstacle(open_dir: Path) -> None:
    tree = open_dir / "passage" / "code"
    tree.mkdir(parents=True)
    (open_dir / "passage").chmod(0o711)

    assert plan(STRANGER, [Tree(tree)]).covers == ()


def test_the_group_bits_count_for_a_member_even_when_others_may_more(open_dir: Path) -> None:
    tree = open_dir / "group" / "code"
    tree.mkdir(parents=True)
    (open_dir / "group").chmod(0o705)
    member = Account("member", uid=54321, gid=(open_dir / "group").stat().st_gid)

    assert plan(member, [Tree(tree)]).covers == (open_dir / "group",)


def test_a_tree_that_the_user_could_not_read_anyway_is_an_error_with_a_remedy(open_dir: Path) -> None:
    tree = open_dir / "private"
    tree.mkdir(mode=0o700)

    with pytest.raises(LaunchFailed, match=r"may not read .*private.*chmod -R go\+rX"):
        plan(STRANGER, [Tree(tree)])


def test_a_missing_tree_is_an_error_that_names_it(open_dir: Path) -> None:
    with pytest.raises(LaunchFailed, match=r"nowhere does not exist"):
        plan(STRANGER, [Tree(open_dir / "nowhere")])


def test_a_role_gets_its_settings_and_none_of_roots_secrets() -> None:
    source = {"EMBERBOX_DATA_DIR": "/d", "LC_ALL": "C", "AWS_SECRET_ACCESS_KEY": "x", "HOME": "/root", "PATH": "/bin"}

    kept = environment(source)

    assert kept["EMBERBOX_DATA_DIR"] == "/d"
    assert kept["PATH"] == "/bin"
    assert kept["HOME"] == "/nonexistent"
    assert "AWS_SECRET_ACCESS_KEY" not in kept
