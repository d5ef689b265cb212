"""The encoder's vectors equal the bare model's on every engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import BertConfig as ReferenceConfig
from transformers import BertModel

from serve.errors import LoadError
from serve.models.bert import Bert, BertConfig, CTranslate2Bert, TorchBert, grouped_by_length, load_bert

SEQUENCES = [[5], [7, 1, 9], [3] * 64, [8, 2, 4], list(range(50)), [1, 2], [6, 60, 6, 60]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BertModel]:
    torch.manual_seed(0)
    config = ReferenceConfig(
        vocab_size=70,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return folder, model


def on_ctranslate2(folder: Path, cache_dir: Path) -> Bert:
    return load_bert(folder, device="cpu", dtype="float32", threads=1, cache_dir=cache_dir)


def on_torch(folder: Path, cache_dir: Path) -> Bert:
    return TorchBert(BertConfig.read(folder), folder / "model.safetensors", device="cpu", dtype="float32")


def copied(source: Path, target: Path, **changes: Any) -> Path:
    """Copy a model's folder, with another value for (or, for None, without) some keys of its config.json."""
    config = json.loads((source / "config.json").read_text()) | changes
    target.mkdir(exist_ok=True)
    kept = {key: value for key, value in config.items() if key not in changes or value is not None}
    (target / "config.json").write_text(json.dumps(kept))
    (target / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    return target


def reference(model: BertModel, sequence: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([sequence])).last_hidden_state[0].numpy()


@pytest.mark.parametrize("load", [on_ctranslate2, on_torch])
def test_every_vector_equals_that_of_the_published_forward_alone(
    tiny: tuple[Path, BertModel], tmp_path: Path, load: Callable[[Path, Path], Bert]
) -> None:
    folder, model = tiny
    bert = load(folder, tmp_path)
    states = [reference(model, sequence) for sequence in SEQUENCES]
    np.testing.assert_allclose(bert.pooled(SEQUENCES, "mean"), [s.mean(axis=0) for s in states], atol=1e-5)
    np.testing.assert_allclose(bert.pooled(SEQUENCES, "cls"), [s[0] for s in states], atol=1e-5)


@pytest.mark.parametrize("load", [on_ctranslate2, on_torch])
def test_weights_of_a_larger_model_and_of_half_precision_are_read(
    tiny: tuple[Path, BertModel], tmp_path: Path, load: Callable[[Path, Path], Bert]
) -> None:
    folder, model = tiny
    prefixed = copied(folder, tmp_path / "prefixed")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {f"bert.{name}": array.astype(np.float16) for name, array in weights.items()}, prefixed / "model.safetensors"
    )
    vectors = load(prefixed, tmp_path / "cache").pooled(SEQUENCES, "mean")
    np.testing.assert_allclose(vectors, [reference(model, s).mean(axis=0) for s in SEQUENCES], atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.2)])
def test_a_gpu_answers_the_same(tiny: tuple[Path, BertModel], tmp_path: Path, dtype: str, tolerance: float) -> None:
    folder, model = tiny
    bert = load_bert(folder, device="cuda", dtype=dtype, threads=1, cache_dir=tmp_path)
    assert isinstance(bert, TorchBert)
    expected = [reference(model, sequence).mean(axis=0) for sequence in SEQUENCES]
    np.testing.assert_allclose(bert.pooled(SEQUENCES, "mean"), expected, atol=tolerance)


def test_the_conversion_is_made_once_and_again_for_other_weights(tiny: tuple[Path, BertModel], tmp_path: Path) -> None:
    folder, _ = tiny
    cache = tmp_path / "cache"
    first = on_ctranslate2(folder, cache).pooled(SEQUENCES, "mean")
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("model.bin")}
    on_ctranslate2(folder, cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("model.bin")} == made
    changed = copied(folder, tmp_path / "changed")
    weights = load_file(folder / "model.safetensors")
    save_file({name: array * np.float32(0.9) for name, array in weights.items()}, changed / "model.safetensors")
    assert not np.allclose(on_ctranslate2(changed, cache).pooled(SEQUENCES, "mean"), first, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, "model_type is 't5'; text-embedding supports 'bert'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_attention_heads": 5}, "no multiple"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"layer_norm_eps": 0}, "layer_norm_eps is 0"),
        ({"intermediate_size": 49}, r"intermediate.*\(49, 32\) is wanted"),
        ({"num_hidden_layers": 3}, "encoder.layer.2"),
    ],
)
def test_a_config_that_does_not_fit_is_named(
    tiny: tuple[Path, BertModel], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = copied(tiny[0], tmp_path / "changed", **changes)
    with pytest.raises(LoadError, match=message):
        on_ctranslate2(folder, tmp_path / "cache")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"[1]", b"\xff" * 100])
def test_a_file_that_is_absent_or_damaged_is_named(
    tiny: tuple[Path, BertModel], tmp_path: Path, name: str, content: bytes | None
) -> None:
    folder = copied(tiny[0], tmp_path / "damaged")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(LoadError, match=name):
        on_ctranslate2(folder, tmp_path / "cache")


def test_a_type_that_the_engine_lacks_is_a_load_error(tiny: tuple[Path, BertModel], tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="nonsense"):
        CTranslate2Bert(
            BertConfig.read(tiny[0]), tiny[0] / "model.safetensors", dtype="nonsense", threads=1, cache_dir=tmp_path
        )


@given(st.lists(st.integers(1, 600), max_size=80))
def test_groups_hold_every_sequence_once_and_waste_little(lengths: list[int]) -> None:
    groups = grouped_by_length(lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        longest, shortest = max(lengths[i] for i in group), min(lengths[i] for i in group)
        assert longest <= 1.25 * shortest
        assert len(group) == 1 or longest * len(group) <= 512


def test_a_cpu_replica_imports_no_torch(tiny: tuple[Path, BertModel], tmp_path: Path) -> None:
    program = (
        "import pathlib, sys; from serve.models.bert import load_bert; "
        "bert = load_bert(pathlib.Path(sys.argv[1]), device='cpu', dtype='float32', threads=1, "
        "cache_dir=pathlib.Path(sys.argv[2])); "
        "bert.pooled([[1, 2]], 'mean'); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tiny[0]), str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]
