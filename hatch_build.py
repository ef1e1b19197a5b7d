"""Compiles emberd, the agent, into the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class AgentBuildHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return  # `make agent` builds it in place
        root = Path(self.root)
        target = root / "src" / "emberbox" / "bin" / "emberd"
        target.parent.mkdir(parents=True, exist_ok=True)
        go = os.environ.get("GO") or shutil.which("go")
        if go is None:
            raise RuntimeError("building the wheel needs Go 1.24 or newer on PATH (or GO=/path/to/go)")
        subprocess.run(
            [
                go,
                "build",
                "-trimpath",
                "-ldflags",
                f"-s -w -X main.version={self.metadata.version}",
                "-o",
                str(target),
                "./cmd/emberd",
            ],
            cwd=root / "agent",
            env={**os.environ, "CGO_ENABLED": "0"},
            check=True,
        )
        build_data["artifacts"].append("src/emberbox/bin/emberd")
        build_data["pure_python"] = False
        build_data["infer_tag"] = False
        build_data["tag"] = "py3-none-linux_x86_64" if os.uname().machine == "x86_64" else "py3-none-linux_aarch64"
