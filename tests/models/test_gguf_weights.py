"""A GGUF file becomes the Hugging Face layout once, with equal weights and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from serve.errors import LoadError
from serve.models.gguf_weights import convert_gguf

TEXTS = [
    "Hello world 12345 foo",
    "naïve café — 你好 🎉 Ελληνικά עברית العربية",
    "  a\n\n\tb   c \r\n",
    "def f(x):\n    return x**2 # 3.14159\n",
    "<|im_start|>user\nhi<|im_end|>\n<repo_name> <|endoftext|>",
    "x1y22z333's I'LL don't we've",
    " \u00a0\u3000 x",
    "",
]


def silent(_what: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(smollm2_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))


@pytest.mark.slow
def test_every_tensor_is_the_one_that_transformers_reads(smollm2_gguf: Path, smollm2_folder: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(smollm2_folder))
    expected = load_gguf_checkpoint(str(smollm2_gguf), return_tensors=True, model_to_load=model)["tensors"]
    found = load_file(smollm2_folder / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_the_configuration_is_the_models(smollm2_folder: Path) -> None:
    config = json.loads((smollm2_folder / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
    assert (config["vocab_size"], config["max_position_embeddings"], config["rope_theta"]) == (49152, 8192, 100000.0)
    assert (config["eos_token_id"], config["tie_word_embeddings"]) == (2, True)


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_equals_the_one_of_transformers(
    text: str, tokenizer: Tokenizer, reference: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer.encode(text).ids
    assert ids == reference(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids, clean_up_tokenization_spaces=False)


@settings(max_examples=200)
@given(text=st.text(max_size=40).filter(lambda text: not any(c.isnumeric() and not c.isascii() for c in text)))
def test_the_tokenizer_equals_the_one_of_transformers_on_any_text(
    text: str, tokenizer: Tokenizer, reference: PreTrainedTokenizerFast
) -> None:
    assert tokenizer.encode(text).ids == reference(text)["input_ids"]


def test_each_numeral_of_any_script_is_apart_as_the_files_pre_tokeniser_says(tokenizer: Tokenizer) -> None:
    # transformers takes no notice of the pre-tokeniser that a GGUF file names, so it joins the bytes of these.
    apart = [token for numeral in "٣½²" for token in tokenizer.encode(numeral).ids]
    assert tokenizer.encode("٣½²").ids == apart


def test_a_file_is_converted_once(smollm2_gguf: Path, smollm2_cache: Path, smollm2_folder: Path) -> None:
    calls: list[int] = []
    assert convert_gguf(smollm2_gguf, smollm2_cache, lambda _what, done, _total: calls.append(done)) == smollm2_folder
    assert calls == []


def write_gguf(path: Path, *, architecture: str = "llama", tensors: tuple[str, ...] = (), **metadata: Any) -> Path:
    """A llama of two heads, without layers; `metadata` replaces what is written by default, None leaves it out."""
    tokens = ["<|end|>", *"abcdef", "ab"]
    values: dict[str, Any] = {
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 4,
        "llama.feed_forward_length": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    } | {name.replace("__", "."): value for name, value in metadata.items()}
    writer = GGUFWriter(path, architecture)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_string(key, value)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 7)
    writer.add_token_merges(["a b"])
    for name in ("token_embd.weight", "output_norm.weight", *tensors):
        writer.add_tensor(name, np.arange(32, dtype=np.float32).reshape(8, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_progress_ends_at_the_last_byte(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = write_gguf(tmp_path / "m.gguf", tensors=("blk.0.attn_q.weight",))
    folder = convert_gguf(path, tmp_path / "cache", lambda _what, done, total: seen.append((done, total)))
    assert seen[-1] == (3 * 128, 3 * 128)
    # Rows of a head come in pairs in GGUF, in halves in safetensors.
    assert load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"][:, 0].tolist() == [
        0, 8, 4, 12, 16, 24, 20, 28,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2' is not supported; supported: llama"),
        ({"tokenizer__ggml__pre": "llama-bpe"}, "pre-tokeniser 'llama-bpe' is not supported"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer 'llama'"),
        ({"tokenizer__ggml__eos_token_id": None}, "lacks the metadata tokenizer.ggml.eos_token_id"),
        ({"tokenizer__ggml__add_bos_token": True}, "begin token"),
        ({"tensors": ("rope_freqs.weight",)}, "rope_freqs"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type 'yarn'"),
        ({"tensors": ("blk.0.ffn_gate_exps.weight",)}, "blk.0.ffn_gate_exps.weight"),
    ],
)
def test_what_is_not_supported_is_named_and_leaves_nothing(tmp_path: Path, changes: Any, complaint: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(LoadError, match=complaint):
        convert_gguf(path, tmp_path / "cache", silent)
    assert [p for p in (tmp_path / "cache").rglob("*") if not p.name.endswith(".lock") and p.name != "gguf"] == []


@pytest.mark.parametrize("content", [b"", b"GG", b"not a GGUF file at all", b"GGUF\x03\0\0\0" + b"\xff" * 40])
def test_a_file_that_is_not_gguf_does_not_load(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(LoadError, match="not a readable GGUF file"):
        convert_gguf(path, tmp_path / "cache", silent)


def test_a_file_cut_short_does_not_load(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(LoadError, match="not a readable GGUF file"):
        convert_gguf(path, tmp_path / "cache", silent)
