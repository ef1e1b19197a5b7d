"""The recipes we ship (`templates/` of the repository): reading them, and the hash that names what they give."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emberbox.images.errors import RecipeError

_Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9+.:~=-]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Exclude(_Strict):
    """Files of packages that are left out."""

    path: str
    keep: str = ""
    """Part of `path` that stays."""


class Debian(_Strict):
    """Where the packages come from."""

    suite: _Word
    components: tuple[_Word, ...]
    mirror: str
    security_mirror: str = ""
    keyring: Path
    source_date_epoch: int
    packages: tuple[_Word, ...]


class TemplateDefaults(_Strict):
    default_user: str = "user"
    default_workdir: str = "/home/user"


class _File(_Strict):
    description: str
    debian: Debian
    exclude: tuple[Exclude, ...] = ()
    template: TemplateDefaults = TemplateDefaults()
    env: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One folder of `templates/`."""

    name: str
    folder: Path
    description: str
    debian: Debian
    exclude: tuple[Exclude, ...]
    template: TemplateDefaults
    env: dict[str, str]
    content_hash: str
    """Changes with any file of the folder."""

    @property
    def customize(self) -> Path:
        return self.folder / "customize.sh"


def recipes_folder() -> Path:
    """`templates/` of the installed package, or of the checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "templates"
    return installed if installed.is_dir() else package.parent.parent / "templates"


def load_recipe(name: str, folder: Path | None = None) -> Recipe:
    """Read a recipe.

    Raises:
        RecipeError: there is none of this name, or its file is wrong; says where.
    """
    place = (folder or recipes_folder()) / name
    path = place / "recipe.toml"
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe '{name}' ({path} is missing)") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from error
    try:
        parsed = _File.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecipeError(f"{path}: {where}: {first['msg']}") from error
    return Recipe(
        name=name,
        folder=place,
        description=parsed.description,
        debian=parsed.debian,
        exclude=parsed.exclude,
        template=parsed.template,
        env=dict(parsed.env),
        content_hash=_hash_folder(place),
    )


def _hash_folder(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            total.update(f"{path.relative_to(folder)} {path.stat().st_mode & 0o111:o} {content}\n".encode())
    return total.hexdigest()
