"""The Grafana dashboards that come with the package, as files: whoever runs Grafana needs no SDK."""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path

from serve.errors import RoundhouseError


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard.

    Args:
        name: Of its file, with `.json`.
        uid: What Grafana knows it by.
        text: What the file holds.
    """

    name: str
    uid: str
    title: str
    text: str


def dashboards() -> list[Dashboard]:
    """Return the dashboards, by name."""
    folder = importlib.resources.files(__name__)
    texts = {file.name: file.read_text() for file in folder.iterdir() if file.name.endswith(".json")}
    return [_dashboard(name, texts[name]) for name in sorted(texts)]


def _dashboard(name: str, text: str) -> Dashboard:
    told = json.loads(text)
    return Dashboard(name, told["uid"], told["title"], text)


def export(folder: Path) -> list[tuple[Path, Dashboard]]:
    """Write the dashboards into a folder, which is made where it is absent; earlier versions of them are replaced.

    Raises:
        RoundhouseError: A file there has the name of a dashboard and is something else, or the folder cannot be
            written; nothing was written in the first case.
    """
    placed = [(folder / found.name, found) for found in dashboards()]
    for path, found in placed:
        if not _is_ours(path, found.uid):
            raise RoundhouseError(
                f"{path} is not an export of the dashboard {found.uid}; move it away, or name another folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, found in placed:
            path.write_text(found.text)
    except OSError as error:
        raise RoundhouseError(f"{folder}: cannot be written: {error.strerror}") from error
    return placed


def _is_ours(path: Path, uid: str) -> bool:
    """Return whether a path is free, or holds some version of the dashboard."""
    try:
        told = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("uid") == uid
