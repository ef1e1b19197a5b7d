"""The templates that ship with Emberbox, as folders: `templates/<name>/template.toml` and the files it copies.

`base` is not among them: it is a recipe of the node's, made from packages. These are ordinary builds on top of it.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emberbox.control.build_plan import BuildPlan, Step, check_plan
from emberbox.control.errors import Invalid
from emberbox.control.names import parse_ref

FILE_NAME = "template.toml"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Template(_Strict):
    from_: Annotated[str, Field(alias="from")] = "base"
    description: str = ""
    cpu_count: int | None = Field(None, ge=1)
    memory_mb: int | None = Field(None, ge=128)
    disk_size_mb: int | None = Field(None, ge=512)
    start_command: str = ""
    ready_command: str = ""


class _Step(_Strict):
    type: Literal["COPY", "RUN", "ENV", "WORKDIR", "USER"]
    args: tuple[str, ...]


class _File(_Strict):
    template: _Template
    step: tuple[_Step, ...] = ()


@dataclass(frozen=True, slots=True)
class ShippedTemplate:
    """One folder, read and checked. Sizes are None where the installation's defaults hold."""

    name: str
    folder: Path
    description: str
    cpu_count: int | None
    memory_mb: int | None
    disk_size_mb: int | None
    plan: BuildPlan


def shipped_folder() -> Path:
    """`templates/` of the installed package, or of the checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "templates"
    return installed if installed.is_dir() else package.parent.parent / "templates"


def shipped_names(folder: Path) -> frozenset[str]:
    """The templates of a folder, whether or not they can be read."""
    return frozenset(path.parent.name for path in folder.glob(f"*/{FILE_NAME}"))


def load_shipped(folder: Path, name: str) -> ShippedTemplate:
    """Read one template. This hashes what it copies: call it in a thread.

    Raises:
        Invalid: its file is missing or wrong, or a COPY names what is not there; says where.
    """
    place = folder / name
    path = place / FILE_NAME
    try:
        parsed = _File.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        raise Invalid(f"no template {name!r} ships with this installation ({path} is missing)") from None
    except tomllib.TOMLDecodeError as error:
        raise Invalid(f"{path} is not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Invalid(f"{path}: {where}: {first['msg']}") from error
    parse_ref(name)
    template = parsed.template
    plan = BuildPlan(
        from_template=template.from_,
        steps=tuple(_step(place, step) for step in parsed.step),
        start_command=template.start_command,
        ready_command=template.ready_command,
    )
    check_plan(plan)
    return ShippedTemplate(
        name=name,
        folder=place,
        description=template.description,
        cpu_count=template.cpu_count,
        memory_mb=template.memory_mb,
        disk_size_mb=template.disk_size_mb,
        plan=plan,
    )


def pack(folder: Path, source: str, archive: Path) -> None:
    """Write what a COPY step copies as E2B's clients do: members are named relative to the folder.

    The same files give the same bytes, whoever packs them.
    """
    with (
        archive.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as tar,
    ):
        for path in _sources(folder, source):
            member = tar.gettarinfo(path, arcname=str(path.relative_to(folder)))
            member.uid = member.gid = 0
            member.uname = member.gname = "root"
            member.mtime = 0
            member.mode = _mode(path)
            if member.isreg():
                with path.open("rb") as file:
                    tar.addfile(member, file)
            else:
                tar.addfile(member)


def _step(folder: Path, step: _Step) -> Step:
    files_hash = ""
    if step.type == "COPY" and len(step.args) >= 2:
        files_hash = _hash(folder, step.args[0], step.args[1])
    return Step(step.type, step.args, files_hash)


def _hash(folder: Path, source: str, destination: str) -> str:
    total = hashlib.sha256(f"COPY {source} {destination}\0".encode())
    for path in _sources(folder, source):
        total.update(f"{path.relative_to(folder)}\0{_mode(path):o}\0".encode())
        if path.is_symlink():
            total.update(os.readlink(path).encode())
        elif path.is_file():
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _mode(path: Path) -> int:
    """What git keeps of a mode: a checkout and an installed package differ in the rest."""
    return 0o755 if path.is_dir() or path.stat(follow_symlinks=False).st_mode & 0o111 else 0o644


def _sources(folder: Path, source: str) -> Iterator[Path]:
    """A path inside the folder and everything below it, in a fixed order."""
    relative = PurePosixPath(source)
    if relative.is_absolute() or ".." in relative.parts:
        raise Invalid(f"{folder / FILE_NAME}: COPY {source!r} is not a path inside the folder")
    top = folder / relative
    if not top.exists():
        raise Invalid(f"{folder / FILE_NAME}: COPY {source!r} names nothing in the folder")
    if top != folder:
        yield top
    if top.is_dir():
        for path in sorted(top.rglob("*")):
            if "__pycache__" not in path.parts:
                yield path
