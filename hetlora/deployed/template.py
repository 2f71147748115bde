"""A new folder from a template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from hetlora.errors import ConfigError
from hetlora.run_folder import write_atomic


def write_template(template: Path, places: Mapping[str, str], folder: Path) -> list[Path]:
    """Each file of `template` at its place in the new folder, with the folder's name for NAME; the files written.

    `ConfigError` where the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists and is not empty; choose a new folder")
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-") or "federation"
    for source, place in places.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / place, (template / source).read_text(encoding="utf-8").replace("NAME", name))
    return [folder / place for place in places.values()]
