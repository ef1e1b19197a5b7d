"""Compiles emberd, the agent, into the wheel."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TAGS = {"x86_64": "py3-none-linux_x86_64", "aarch64": "py3-none-linux_aarch64"}


class AgentBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return  # `make agent` builds it in place
        tag = TAGS.get(platform.machine())
        if tag is None:
            raise RuntimeError(f"emberd is built for {' and '.join(TAGS)}, not for {platform.machine()}")
        emberd = self._build_agent(Path(self.root) / "agent")
        build_data["force_include"][str(emberd)] = "emberbox/bin/emberd"
        build_data["pure_python"] = False
        build_data["infer_tag"] = False
        build_data["tag"] = tag

    def _build_agent(self, source: Path) -> Path:
        go = os.environ.get("GO") or shutil.which("go")
        if go is None:
            raise RuntimeError(
                "building the wheel needs Go, of the version in agent/go.mod, on PATH or as GO=/path/to/go"
            )
        emberd = source / "build" / "emberd"
        command = [source / "build.sh", emberd, self.metadata.version]
        subprocess.run(command, env={**os.environ, "GO": go}, check=True)
        return emberd
