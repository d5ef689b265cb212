"""The names of ImageNet's classes, which published weights leave out."""

from __future__ import annotations

import json
from pathlib import Path

from serve.errors import LoadError

_IMAGENET = Path(__file__).with_name("imagenet_labels.json")


def load_labels(path: Path | None = None) -> list[str]:
    """Return class names in the order of the logits: those of a JSON list, or the 1,000 of ImageNet-1k.

    Raises:
        LoadError: The file is absent or holds anything but a JSON list of strings.
    """
    path = path or _IMAGENET
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"labels cannot be read from {path}: {error}") from error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise LoadError(f"labels in {path} are no JSON list of strings")
    return labels
