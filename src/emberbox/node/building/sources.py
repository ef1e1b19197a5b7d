"""What a build starts from: a shipped recipe, an OCI image, or another build."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emberbox.images.base import build_base
from emberbox.images.host_network import HostNetwork, read_host_network
from emberbox.images.layers import LayerStore
from emberbox.images.oci import Images
from emberbox.node.building.journal import Journal
from emberbox.node.building.model import DEFAULT_USER, DEFAULT_WORKDIR, SANE_PATH, NewBuild
from emberbox.node.building.plan import BuildState
from emberbox.node.errors import BadValue, LayerMissing
from emberbox.node.model import Image
from emberbox.settings import Settings


@dataclass(frozen=True, slots=True)
class Base:
    """Layers that are here, and what steps on them begin with."""

    layers: tuple[str, ...]
    state: BuildState
    size_bytes: int
    raw: bool = False
    """An image as its registry has it: what a template needs is still to be put in."""
    path: str = ""
    """The image's PATH where it is not the usual one."""
    start_command: str = ""
    ready_command: str = ""


class Sources:
    """Has a build's source ready on this node."""

    def __init__(self, settings: Settings, layers_dir: Path, images: Images) -> None:
        self._settings = settings
        self._layers_dir = layers_dir
        self._store = LayerStore(layers_dir)
        self._images = images

    async def host_network(self) -> HostNetwork:
        """What sandboxes inherit from this host."""
        return await asyncio.to_thread(read_host_network) if self._settings.inherit_host_network else HostNetwork()

    async def base(self, new: NewBuild, journal: Journal, keep: Callable[[str], None]) -> Base:
        """
        Args:
            keep: told of every layer before anything else can remove it.

        Raises:
            ImageError: the recipe or the image cannot be had; says why.
            LayerMissing: a layer of the other build is not on this node.
            BadValue: it starts from nothing.
        """
        if new.recipe:
            base = await self._from_recipe(new, journal)
            for digest in base.layers:
                keep(digest)
            return base
        if new.from_build is not None:
            for digest in new.from_build.layers:
                keep(digest)
            return await self._from_build(new.from_build)
        if new.from_image:
            return await self._from_image(new, journal, keep)
        raise BadValue("a build needs a recipe, an image or another build to start from")

    async def _from_recipe(self, new: NewBuild, journal: Journal) -> Base:
        def tell(stage: str, fraction: float) -> None:
            journal.log(stage)
            journal.progress(stage, fraction)

        fresh = new.force and not new.steps
        built = await build_base(self._layers_dir, self._settings, tell, name=new.recipe, fresh=fresh)
        state = BuildState(env=built.env, user=built.default_user, workdir=built.default_workdir)
        return Base(built.layers, state, built.size_bytes)

    async def _from_build(self, image: Image) -> Base:
        size = 0
        for digest in image.layers:
            path = await asyncio.to_thread(self._store.path, digest)
            if path is None:
                raise LayerMissing(digest)
            size += (await asyncio.to_thread(path.stat)).st_size
        state = BuildState(
            env=image.env_vars,
            user=image.default_user or DEFAULT_USER,
            workdir=image.default_workdir or DEFAULT_WORKDIR,
        )
        return Base(image.layers, state, size, start_command=image.start_command, ready_command=image.ready_command)

    async def _from_image(self, new: NewBuild, journal: Journal, keep: Callable[[str], None]) -> Base:
        pulled = await self._images.pull(new.from_image, new.credentials, journal.log, journal.progress, keep)
        host = await self.host_network()
        path = pulled.env.get("PATH", "")
        state = BuildState(env={**pulled.env, **host.env})
        return Base((pulled.layer,), state, pulled.size_bytes, raw=True, path="" if path in ("", SANE_PATH) else path)
