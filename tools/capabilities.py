"""Writes capabilities/*.yaml from the catalogue. `--check` only tells whether they are current."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from emberbox.api.capabilities.catalogue import CAPABILITIES
from emberbox.api.capabilities.specification import specification

FOLDER = Path(__file__).parents[1] / "capabilities"


def main() -> int:
    stale = []
    for capability in CAPABILITIES:
        path = FOLDER / f"{capability.name}.yaml"
        text = yaml.safe_dump(specification(capability), sort_keys=False, width=120)
        if not path.exists() or path.read_text() != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(text)
    if stale and "--check" in sys.argv:
        print(f"stale: {', '.join(stale)}; run 'python tools/capabilities.py'")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
