"""Which runtime a node takes, and what it says of that."""

from __future__ import annotations

from pathlib import Path

import pytest

from emberbox.cli import requirements
from emberbox.cli.requirements import Finding, Verdict, runtime_here
from emberbox.node import runtimes
from emberbox.node.errors import Unsupported
from emberbox.node.runtimes import choose_runtime
from emberbox.runtime.firecracker import setup
from emberbox.runtime.firecracker.errors import FirecrackerError
from emberbox.runtime.firecracker.runtime import FirecrackerRuntime
from emberbox.settings import Settings


class _Opened:
    """Stands for a runtime of microVMs that was opened."""

    name = "firecracker"
    capabilities = FirecrackerRuntime.capabilities


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A host on which microVMs work, for the test to take something away from."""

    async def opened(_: Settings) -> _Opened:
        return _Opened()

    monkeypatch.setattr(runtimes, "_kvm_usable", lambda: True)
    monkeypatch.setattr(setup, "present", lambda _: True)
    monkeypatch.setattr(setup, "open_runtime", opened)
    return monkeypatch


def settings(tmp_path: Path, runtime: str = "auto") -> Settings:
    return Settings(data_dir=tmp_path, runtime=runtime)  # type: ignore[arg-type]


async def test_auto_takes_microvms_where_they_work(host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = await choose_runtime(settings(tmp_path))

    assert (chosen.runtime.name, "KVM" in chosen.why) == ("firecracker", True)


@pytest.mark.parametrize(
    ("lacks", "why"),
    [("kvm", "/dev/kvm"), ("parts", "emberbox setup"), ("guest", "a guest kernel died")],
)
async def test_auto_takes_containers_where_something_lacks_and_says_what(
    host: pytest.MonkeyPatch, tmp_path: Path, lacks: str, why: str
) -> None:
    async def dies(_: Settings) -> _Opened:
        raise FirecrackerError("a guest kernel died before it had booted")

    match lacks:
        case "kvm":
            host.setattr(runtimes, "_kvm_usable", lambda: False)
        case "parts":
            host.setattr(setup, "present", lambda _: False)
        case "guest":
            host.setattr(setup, "open_runtime", dies)

    chosen = await choose_runtime(settings(tmp_path))

    assert chosen.runtime.name == "container"
    assert why in chosen.why
    if lacks != "parts":  # those would be installed
        with pytest.raises(Unsupported, match=why):
            await choose_runtime(settings(tmp_path, "firecracker"))


async def test_containers_are_taken_where_they_are_set(host: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = await choose_runtime(settings(tmp_path, "container"))

    assert (chosen.runtime.name, chosen.why) == ("container", "it is set")


@pytest.mark.parametrize(
    ("runtime", "kvm", "installed", "said"),
    [
        ("auto", Verdict.FOUND, ("firecracker", "guest"), "firecracker, as a guest kernel boots"),
        ("auto", Verdict.FOUND, ("firecracker",), "firecracker if a guest kernel boots when Emberbox starts"),
        ("auto", Verdict.FOUND, (), "container, as Firecracker is not installed; with `emberbox setup`"),
        ("auto", Verdict.ABSENT, ("firecracker", "guest"), "container, as there is no KVM to use: it died"),
        ("container", Verdict.FOUND, ("firecracker", "guest"), "container, as it is set"),
    ],
)
def test_doctor_says_which_runtime_is_taken_and_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runtime: str, kvm: Verdict, installed: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr(requirements.firecracker, "present", lambda _: "firecracker" in installed)
    chosen = settings(tmp_path, runtime)
    if "guest" in installed:
        (requirements.firecracker.parts_dir(chosen) / "guest").mkdir(parents=True)

    assert runtime_here(chosen, Finding("kvm", kvm, "it died")).startswith(said)
