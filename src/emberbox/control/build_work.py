"""Seeing one build through: which node, what it is told, and what its end means for the store and the node's disk."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import structlog

from emberbox.control.build_plan import BuildPlan, build_request
from emberbox.control.build_run import BuildRun, Outcome
from emberbox.control.clock import now_ms
from emberbox.control.errors import ControlError, Invalid, NodeUnavailable, NotFound
from emberbox.control.names import DEFAULT_TAG
from emberbox.control.nodes import Node
from emberbox.control.plane import Plane
from emberbox.control.rates import given_rates
from emberbox.control.uploads import Uploads
from emberbox.store import templates as rows
from emberbox.store.records import BuildRecord, TagRecord
from emberbox.wire import node_pb2 as pb

log = structlog.get_logger()

UNFINISHED = ("waiting", "building")

_AWAY_SECONDS = 300.0
_LOOK_SECONDS = 0.25
_WRITE_PAUSES = (1.0, 2.0, 5.0, 15.0, 60.0, 60.0, 60.0)

_LONGEST_USER = 64
"""As in the table."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a build is, as its node says. `fraction` is 0..1 of the whole."""

    stage: str
    fraction: float


class BuildWork:
    def __init__(self, plane: Plane, uploads: Uploads) -> None:
        self._plane = plane
        self._uploads = uploads
        self._progress: dict[str, Progress] = {}

    def progress(self, build_id: str) -> Progress | None:
        """How far a build is that this process follows."""
        return self._progress.get(build_id)

    async def carry_out(self, build_id: str, team_id: str, plan: BuildPlan) -> None:
        """See a build through; returns when its row says how it ended. Being cancelled leaves it as it is."""
        try:
            build, outcome = await self._outcome(build_id, team_id, plan)
        except ControlError as error:
            reason = {"message": error.message}
            await self._surely(lambda: self.fail(build_id, reason))
            return
        except Exception:
            log.exception("build.broke", build_id=build_id)
            reason = {"message": "internal error; the server's log says more"}
            await self._surely(lambda: self.fail(build_id, reason))
            return
        finally:
            self._progress.pop(build_id, None)
        if isinstance(outcome, pb.BuildDone):
            await self._surely(lambda: self._finish(build, outcome))
            return
        reason = {"message": outcome.message or "the node gave no reason"}
        if outcome.step:
            reason["step"] = outcome.step
        await self._surely(lambda: self.fail(build.id, reason))

    async def _surely(self, write: Callable[[], Awaitable[object]]) -> None:
        """Write down how a build ended, also when the database is away for a while."""
        for pause in _WRITE_PAUSES:
            try:
                await write()
                return
            except Exception:
                log.exception("build.not_written")
                await asyncio.sleep(pause)
        await write()

    async def _outcome(self, build_id: str, team_id: str, plan: BuildPlan) -> tuple[BuildRecord, Outcome]:
        build = await rows.get_build(self._plane.store, build_id)
        if build is None or build.status not in UNFINISHED:
            raise NotFound(f"build {build_id!r} is not to be built any more")
        request: pb.BuildRequest | None = None
        if build.status == "building":
            node = await self._node(build.node_id)
        else:
            build, node, request = await self._begin(build, team_id, plan)
        started_ms = (build.request or {}).get("started_ms", build.created_at)
        run = BuildRun(
            self._plane,
            node,
            build,
            request,
            deadline_ms=started_ms + self._plane.settings.build_seconds * 1000,
            progress=lambda stage, fraction: self._progress.__setitem__(build_id, Progress(stage, fraction)),
        )
        return build, await run.outcome()

    async def _begin(
        self, build: BuildRecord, team_id: str, plan: BuildPlan
    ) -> tuple[BuildRecord, Node, pb.BuildRequest]:
        """Choose a node for a build that waits, and say so in its row."""
        stored = build.request or {}
        source_id = stored.get("source_build")
        source = await rows.get_build(self._plane.store, source_id) if source_id else None
        if source_id and source is None:
            raise Invalid("the template that it builds from was deleted meanwhile")
        request = self._request(build, team_id, plan, source)
        node = await self._node(source.node_id if source else None)
        begun_with: dict[str, object] = {"started_ms": now_ms()}
        if "recipe" in stored:
            begun_with["made_of"] = (await node.describe()).base_key
        changes = {
            "status": "building",
            "node_id": node.node_id,
            "worker": self._plane.worker,
            "updated_at": now_ms(),
            "request": {**stored, **begun_with},
        }
        begun = await rows.change_build(self._plane.store, build.id, statuses=["waiting"], changes=changes)
        if begun is None:
            raise NotFound(f"build {build.id!r} is not waiting any more")
        return begun, node, request

    def _request(
        self, build: BuildRecord, team_id: str, plan: BuildPlan, source: BuildRecord | None
    ) -> pb.BuildRequest:
        recipe = (build.request or {}).get("recipe")
        files_dir = str(self._uploads.folder(team_id))
        given = given_rates(build.rates, self._plane.settings)
        request = build_request(build, team_id, plan, rates=given, files_dir=files_dir, source=source)
        if recipe:
            request.recipe = recipe
        return request

    async def _node(self, node_id: str | None) -> Node:
        """The node of this ID (None: any that takes builds), waiting a while for it.

        Raises:
            NodeUnavailable: it does not come.
        """
        end = asyncio.get_running_loop().time() + _AWAY_SECONDS * self._plane.settings.time_scale
        while True:
            try:
                return self._plane.nodes.get(node_id) if node_id else self._plane.nodes.place()
            except NodeUnavailable:
                if asyncio.get_running_loop().time() > end:
                    raise
            await asyncio.sleep(_LOOK_SECONDS)

    async def _finish(self, build: BuildRecord, done: pb.BuildDone) -> None:
        now = now_ms()
        image = done.image
        if problem := _problem(image):
            await self.fail(build.id, {"message": problem})
            await self._release(build, list(image.layers))
            return
        tags = (build.request or {}).get("tags") or [DEFAULT_TAG]
        ready = await rows.change_build(
            self._plane.store,
            build.id,
            statuses=["building"],
            changes={
                "status": "ready",
                "worker": None,
                "layers": list(image.layers),
                "env_vars": dict(image.env_vars),
                "default_user": image.default_user,
                "default_workdir": image.default_workdir,
                "start_command": image.start_command,
                "ready_command": image.ready_command,
                "size_bytes": done.size_bytes,
                "agent_version": done.agent_version,
                "updated_at": now,
                "finished_at": now,
            },
            tags=[TagRecord(str(uuid.uuid4()), build.template_id, tag, build.id, now) for tag in tags],
        )
        if ready is None:
            log.info("build.unwanted", build_id=build.id)
            await self._release(build, list(image.layers))
            return
        log.info("build.ready", build_id=build.id, template_id=build.template_id, size_bytes=done.size_bytes)

    async def fail(self, build_id: str, reason: dict[str, str]) -> bool:
        """Mark a build as failed; what was ready before stays in use. Returns whether it was unfinished."""
        now = now_ms()
        before = await rows.get_build(self._plane.store, build_id)
        failed = await rows.change_build(
            self._plane.store,
            build_id,
            statuses=UNFINISHED,
            changes={
                "status": "error",
                "worker": None,
                # PostgreSQL has no NUL.
                "reason": {key: text.replace("\0", "") for key, text in reason.items()},
                "layers": [],
                "updated_at": now,
                "finished_at": now,
            },
        )
        if failed is None or before is None:
            return False
        log.warning("build.failed", build_id=build_id, reason=reason["message"], step=reason.get("step"))
        if before.layers:
            await self._release(failed, before.layers)
        return True

    async def _release(self, build: BuildRecord, layers: list[str]) -> None:
        """Have the node remove those of a build's layers that no build uses any more."""
        unused = await rows.unused_layers(self._plane.store, layers, but_by=build.id)
        if unused:
            await self._plane.delete_on_node(replace(build, layers=sorted(unused)))


def _problem(image: pb.Image) -> str:
    """Why a built image cannot be written down, for people; empty when it can."""
    texts = (image.default_user, image.default_workdir, image.start_command, image.ready_command)
    if any("\0" in text for text in (*texts, *image.env_vars, *image.env_vars.values())):
        return "the image sets a variable, user, directory or command with a NUL, which no program can be given"
    if len(image.default_user) > _LONGEST_USER:
        return f"the name of the image's user is longer than {_LONGEST_USER} characters; set a shorter one with USER"
    return ""
