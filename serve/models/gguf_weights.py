"""GGUF files become the Hugging Face layout once, so that every later load is an mmap and only one loader exists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.cache import build_once
from serve.errors import LoadError

if TYPE_CHECKING:
    from gguf import GGUFReader

Progress = Callable[[str, int, int], None]

#: Part of the cache key: what is written for one GGUF file changes with it.
FORMAT = 1

_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type, GGUF specification

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(path: Path, cache_dir: Path, progress: Progress) -> Path:
    """Return a folder of config.json, model.safetensors (float32), tokenizer.json and tokenizer_config.json.

    Converted on the first call for a file's content, found in the cache after that.

    Args:
        path: A GGUF file of the llama architecture, of any quantisation that the `gguf` package can expand.
        cache_dir: As `serve.cache.build_once`.
        progress: Called with bytes written and bytes in all.

    Raises:
        LoadError: Another architecture, tokenizer or pre-tokeniser, or a file that is not GGUF.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return build_once(cache_dir, f"gguf/{digest[:32]}-{FORMAT}", lambda folder: _build(path, folder, progress))


def _build(path: Path, folder: Path, progress: Progress) -> None:
    from gguf import GGUFReader

    progress("reading the GGUF metadata", 0, 0)
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeError, MemoryError) as error:
        raise LoadError(f"{path.name} is not a readable GGUF file: {error}") from error
    config = read_config(reader)
    tokenizer, tokenizer_config = read_tokenizer(reader)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1, ensure_ascii=False))
    _write_weights(reader, config, folder / "model.safetensors", progress)


def _value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is None:
        raise LoadError(f"the GGUF file lacks the metadata {key}")
    return default


def read_config(reader: GGUFReader) -> dict[str, Any]:
    """Return the metadata in the words of a Hugging Face config.json.

    Raises:
        LoadError: The architecture is not `llama`, or its rotary frequencies are scaled.
    """
    architecture = _value(reader, "general.architecture")
    if architecture != "llama":
        raise LoadError(f"GGUF architecture {architecture!r} is not supported; supported: llama")
    heads = _value(reader, "llama.attention.head_count")
    hidden = _value(reader, "llama.embedding_length")
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise LoadError("the GGUF file lacks the tensor token_embd.weight")
    if "rope_freqs.weight" in shapes:
        raise LoadError(
            "GGUF files with scaled rotary frequencies (rope_freqs.weight) are not supported; use the safetensors"
        )
    scaling = _value(reader, "llama.rope.scaling.type", "none")
    if scaling != "none":
        raise LoadError(
            f"GGUF files with rotary scaling (llama.rope.scaling.type {scaling!r}) are not supported; supported: none"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "head_dim": _value(reader, "llama.rope.dimension_count", hidden // heads),
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv", heads),
        "vocab_size": shapes["token_embd.weight"][1],
        "max_position_embeddings": _value(reader, "llama.context_length"),
        "rms_norm_eps": _value(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _value(reader, "llama.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }


def read_tokenizer(reader: GGUFReader) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the contents of tokenizer.json and tokenizer_config.json.

    Raises:
        LoadError: Not a byte-level BPE with the `smollm` pre-tokeniser, the only one proved equal.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, splitter = _value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre", "default")
    if (kind, splitter) != ("gpt2", "smollm"):
        raise LoadError(
            f"GGUF tokenizer {kind!r} with pre-tokeniser {splitter!r} is not supported; 'gpt2' with 'smollm' is."
            " Use the model's Hugging Face folder instead"
        )
    tokens: list[str] = _value(reader, "tokenizer.ggml.tokens")
    types: list[int] = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in _value(reader, "tokenizer.ggml.merges")]
    try:
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    except Exception as error:  # the library raises bare Exception
        raise LoadError(f"the GGUF file's merges do not fit its tokens: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, types, strict=True) if k == wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    bos, eos = (
        tokens[_value(reader, "tokenizer.ggml.bos_token_id")],
        tokens[_value(reader, "tokenizer.ggml.eos_token_id")],
    )
    if _value(reader, "tokenizer.ggml.add_bos_token", False):
        raise LoadError(
            "GGUF tokenizers that add a begin token to every prompt are not supported; use the Hugging Face folder"
        )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    template = reader.get_field("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template.contents()
    return json.loads(tokenizer.to_str()), config


def _hugging_face_name(name: str) -> str:
    if name in _GLOBAL:
        return _GLOBAL[name]
    block, _, rest = name.removeprefix("blk.").partition(".")
    part, _, suffix = rest.rpartition(".")
    if not block.isdigit() or part not in _IN_LAYER:
        raise LoadError(f"the GGUF file holds the tensor {name!r}, which the llama architecture does not have")
    return f"model.layers.{block}.{_IN_LAYER[part]}.{suffix}"


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo the order of rows that llama.cpp gives q and k: pairs (2i, 2i+1) back to halves (i, i + d/2)."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _write_weights(reader: GGUFReader, config: dict[str, Any], path: Path, progress: Progress) -> None:
    """Write the safetensors format a tensor at a time, so that memory never holds the whole expanded model."""
    from gguf.quants import dequantize

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        start, end = end, end + 4 * int(np.prod(shape))
        header[_hugging_face_name(tensor.name)] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)  # the data starts aligned
    permuted = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        done = 0
        for tensor in reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            part = tensor.name.split(".")[-2]
            if part in permuted:
                values = _unpermute(values, permuted[part])
            file.write(np.ascontiguousarray(values).data)
            done += values.nbytes
            progress("converting the GGUF weights", done, end)
