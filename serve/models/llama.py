"""A lean forward of the llama family over slots of a preallocated cache, because start-up and small batches are all
overhead in a general library.

Names follow the Hugging Face layout of weights. Sources: LLaMA (arXiv:2302.13971), grouped-query attention
(arXiv:2305.13245), rotary embeddings (arXiv:2104.09864), Llama 3.1's rotary scaling (its config's `rope_type: llama3`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError, safe_open
from torch import Tensor

from serve.errors import LoadError

SUPPORTED = ("llama", "mistral", "qwen2")

#: Two best logits nearer than this are looked at again on float32 weights.
NEAR_TIE = 0.1

_LINEARS = ("qkv", "out", "gate_up", "down")

Progress = Callable[[str, int, int], None]
#: (layer, queries [rows, heads, head_dim]) -> mixed values, the same numbers in the same order
Attend = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The shape of a model; fields are named as in config.json, `rope_*` as their meaning."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: Mapping[str, Any]
    eos_token_ids: frozenset[int]

    @classmethod
    def read(cls, folder: Path) -> LlamaConfig:
        """Read `folder/config.json`.

        Raises:
            LoadError: It is absent or names something that this forward does not compute.
        """
        try:
            raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise LoadError(f"config.json of the model is not readable: {error}") from error
        kind = raw.get("model_type")
        if kind not in SUPPORTED:
            raise LoadError(
                f"model_type {kind!r} is not supported for text-generation; supported: {', '.join(SUPPORTED)}"
            )
        _refuse_unknown(raw, kind)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        try:
            heads = raw["num_attention_heads"]
            eos = raw.get("eos_token_id")
            return cls(
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                vocab_size=raw["vocab_size"],
                rms_norm_eps=raw["rms_norm_eps"],
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                max_position_embeddings=raw["max_position_embeddings"],
                rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
                rope_scaling=rope,
                eos_token_ids=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
            )
        except KeyError as error:
            raise LoadError(f"config.json of the model lacks {error.args[0]!r}") from error


def _refuse_unknown(raw: Mapping[str, Any], kind: str) -> None:
    """Refuse what would compute without an error and be wrong."""
    if raw.get("hidden_act", "silu") != "silu":
        raise LoadError(f"hidden_act {raw['hidden_act']!r} is not supported; supported: silu")
    if raw.get("quantization_config"):
        raise LoadError(
            "quantised safetensors (quantization_config) are not supported; use the unquantised model or a GGUF"
        )
    window = raw.get("sliding_window")
    if window and (kind == "mistral" or raw.get("use_sliding_window")):
        raise LoadError(f"sliding-window attention (sliding_window {window}) is not supported")


def rotary_table(config: LlamaConfig, positions: int) -> Tensor:
    """Return the rotation of each position and pair of dimensions, complex64 [positions, head_dim / 2].

    Raises:
        LoadError: A scaling other than `default` or `llama3`.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequency = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "llama3":
        frequency = _llama3_frequency(frequency, scaling)
    elif kind != "default":
        raise LoadError(f"rope scaling {kind!r} is not supported; supported: default, llama3")
    angles = torch.outer(torch.arange(positions).float(), frequency)
    return torch.complex(angles.cos(), angles.sin())


def _llama3_frequency(frequency: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Slow the low frequencies by `factor`, keep the high ones, and blend between."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * keep + frequency / factor * (1 - keep)


class Weights:
    """The tensors of a folder, mapped from model.safetensors or from the files of its index, each read at most once."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        files = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.is_file()
            else ["model.safetensors"]
        )
        self._tensors: dict[str, Tensor] = {}
        for name in files:
            try:
                with safe_open(folder / name, framework="pt") as file:
                    self._tensors.update((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise LoadError(f"{name} of the model is not readable: {error}") from error

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor. Raises `LoadError` where it is absent or of another shape."""
        if name not in self._tensors:
            raise LoadError(f"the model's files lack the tensor {name}")
        tensor = self._tensors.pop(name)
        if tuple(tensor.shape) != shape:
            raise LoadError(f"the tensor {name} has shape {list(tensor.shape)} where config.json says {list(shape)}")
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def finish(self) -> None:
        """Raise `LoadError` where a tensor was never taken: the model computes something that this forward does not."""
        left = [name for name in self._tensors if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight"]
        if left:
            raise LoadError(f"the model has tensors that its architecture does not: {', '.join(left[:3])}")


class Dense:
    """A linear map on the weights as they were read."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, rows: Tensor) -> Tensor:
        """Return `rows @ weight.T + bias`."""
        return F.linear(rows, self.weight, self.bias)

    def packed(self) -> Packed:
        """Return the same map for few rows on a CPU."""
        return Packed(self.weight, self.bias)


class Packed:
    """A linear map with float16 weights in FBGEMM's order, float32 rows and float32 sums."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)
        self._apply = torch.ops.quantized.linear_dynamic_fp16.default

    def __call__(self, rows: Tensor) -> Tensor:
        """Return `rows @ weight.T + bias`."""
        result: Tensor = self._apply(rows, self._packed)
        return result


Linear = Dense | Packed


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer block; the linears are q, k, v in one and gate, up in one."""

    attention_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Stack:
    """What turns embeddings into logits."""

    layers: Sequence[Layer]
    norm: Tensor
    head: Linear

    def logits(self, hidden: Tensor, eps: float) -> Tensor:
        """Return float32 [rows, vocab_size] of [rows, hidden_size]."""
        return self.head(_rms_norm(hidden, self.norm, eps)).float()

    def packed(self, progress: Progress) -> Stack:
        """Return the same maps for few rows on a CPU."""
        layers = []
        for done, layer in enumerate(self.layers):
            progress("packing layers", done, len(self.layers))
            layers.append(replace(layer, **{name: getattr(layer, name).packed() for name in _LINEARS}))
        return Stack(layers, self.norm, self.head.packed())


class Llama:
    """A model of the llama family and the key/value cache of its slots.

    On a CPU with FBGEMM a decode step reads its weights in float16, half the bytes of what bounds it, and multiplies
    and adds in float32. Where the two best logits of a row are then nearer than `near_tie`, the row can be decoded
    again on the float32 weights (`exact=True`), so that the greedy choice is the float32 model's.

    Args:
        folder: config.json and safetensors in the Hugging Face layout.
        device: A torch device.
        dtype: Type of weights, activations and cache; float16 on a CPU is float32 without the second look at near ties.
        slots: Sequences that the cache holds.
        context_tokens: Positions of each.
        progress: Called with (what, layers done, layers in all).

    Raises:
        LoadError: The folder does not hold a supported model.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str,
        dtype: torch.dtype,
        slots: int,
        context_tokens: int,
        progress: Progress = lambda _what, _done, _total: None,
    ) -> None:
        self.config = config = LlamaConfig.read(folder)
        if context_tokens > config.max_position_embeddings:
            raise LoadError(f"context_tokens {context_tokens} is above the model's {config.max_position_embeddings}")
        self.device = torch.device(device)
        self.context_tokens = context_tokens
        packs = device == "cpu" and dtype != torch.bfloat16 and "fbgemm" in torch.backends.quantized.supported_engines
        self.near_tie = NEAR_TIE if packs and dtype == torch.float32 else 0.0
        self._dtype = torch.float32 if device == "cpu" and dtype == torch.float16 else dtype
        self._rotary = rotary_table(config, context_tokens).to(self.device)
        weights = Weights(folder)
        embedding = self._place(weights.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size))
        head = embedding
        if not config.tie_word_embeddings:
            head = self._place(weights.take("lm_head.weight", config.vocab_size, config.hidden_size))
        norm = self._place(weights.take("model.norm.weight", config.hidden_size))
        layers = [self._read_layer(weights, index) for index in range(config.num_hidden_layers)]
        weights.finish()
        self._embedding = embedding
        self._exact = Stack(layers, norm, Dense(head))
        self._fast = self._exact.packed(progress) if packs else self._exact
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, context_tokens, config.head_dim)
        self._keys, self._values = self._cache(shape), self._cache(shape)

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self._dtype)

    def _cache(self, shape: tuple[int, ...]) -> Tensor:
        """Return zeros; on a CPU their pages are taken as they are written, so memory follows the tokens that are held."""
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self._dtype, device=self.device)
        size = math.prod(shape) * self._dtype.itemsize
        return torch.from_numpy(np.zeros(size, np.uint8)).view(self._dtype).view(shape)

    def _read_layer(self, weights: Weights, index: int) -> Layer:
        config, prefix = self.config, f"model.layers.{index}."
        hidden, inner = config.hidden_size, config.intermediate_size
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        parts, biases = [], []
        for part, count in zip("qkv", heads, strict=True):
            name, size = f"{prefix}self_attn.{part}_proj", count * config.head_dim
            turn = (lambda rows: rows) if part == "v" else partial(_pair_rows, heads=count)  # noqa: B023
            parts.append(turn(weights.take(f"{name}.weight", size, hidden)))
            if f"{name}.bias" in weights:
                biases.append(turn(weights.take(f"{name}.bias", size)))
        gate_up = [weights.take(f"{prefix}mlp.{part}_proj.weight", inner, hidden) for part in ("gate", "up")]
        out = weights.take(f"{prefix}self_attn.o_proj.weight", hidden, heads[0] * config.head_dim)
        return Layer(
            attention_norm=self._place(weights.take(f"{prefix}input_layernorm.weight", hidden)),
            qkv=Dense(self._place(torch.cat(parts)), self._place(torch.cat(biases)) if biases else None),
            out=Dense(self._place(out)),
            mlp_norm=self._place(weights.take(f"{prefix}post_attention_layernorm.weight", hidden)),
            gate_up=Dense(self._place(torch.cat(gate_up))),
            down=Dense(self._place(weights.take(f"{prefix}mlp.down_proj.weight", hidden, inner))),
        )

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], *, slot: int, start: int) -> Tensor:
        """Put a piece of a prompt into the cache, after the `start` tokens of its slot that are there.

        Returns:
            Logits of the last token, float32 [vocab_size].
        """
        count = len(tokens)
        end = start + count
        mask = None if count == 1 else torch.ones(count, end, dtype=torch.bool, device=self.device).tril(start)

        def attend(index: int, queries: Tensor) -> Tensor:
            keys = self._keys[index, slot : slot + 1, :, :end]
            values = self._values[index, slot : slot + 1, :, :end]
            mixed = F.scaled_dot_product_attention(
                queries.transpose(0, 1).unsqueeze(0), keys, values, attn_mask=mask, enable_gqa=True
            )
            return mixed[0].transpose(0, 1)

        positions = torch.arange(start, end, device=self.device)
        where = torch.full_like(positions, slot)
        hidden = self._run(self._exact, torch.tensor(tokens, device=self.device), where, positions, attend)
        return self._exact.logits(hidden[-1:], self.config.rms_norm_eps)[0]

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], *, slots: Sequence[int], starts: Sequence[int], exact: bool = False) -> Tensor:
        """Put one token into each of several slots.

        Args:
            tokens: The new token of each row.
            slots: The slot of each row, ascending.
            starts: Tokens that each row's slot holds already; the new one is written after them.
            exact: Use the weights as they were read.

        Returns:
            Logits, float32 [rows, vocab_size].
        """
        stack = self._exact if exact else self._fast
        where = torch.tensor(slots, device=self.device)
        positions = torch.tensor(starts, device=self.device)
        attend = self._decode_attention(slots, starts, where)
        hidden = self._run(stack, torch.tensor(tokens, device=self.device), where, positions, attend)
        return stack.logits(hidden, self.config.rms_norm_eps)

    def _decode_attention(self, slots: Sequence[int], starts: Sequence[int], where: Tensor) -> Attend:
        """Attend over the span of slots from the lowest to the highest row's, as far as the longest row goes.

        The queries of one key/value head are the rows of one small product; slots of the span that have no row
        compute one position, which nobody reads.
        """
        low, high, longest = slots[0], slots[-1] + 1, max(starts) + 1
        span, sparse = high - low, high - low != len(slots)
        lengths = torch.ones(span, 1, dtype=torch.long)
        lengths[[slot - low for slot in slots], 0] = torch.tensor(starts) + 1
        mask = None
        if span > 1:
            hidden = torch.arange(longest) >= lengths
            mask = torch.zeros(span, longest, dtype=self._dtype).masked_fill_(hidden, -math.inf).to(self.device)
            mask = mask.view(span, 1, 1, longest)
        groups = self.config.num_key_value_heads

        def attend(index: int, queries: Tensor) -> Tensor:
            if sparse:
                spread = queries.new_zeros(span, *queries.shape[1:])
                spread[where - low] = queries
                queries = spread
            mixed = F.scaled_dot_product_attention(
                queries.unflatten(1, (groups, -1)),
                self._keys[index, low:high, :, :longest],
                self._values[index, low:high, :, :longest],
                attn_mask=mask,
            )
            return mixed[where - low] if sparse else mixed

        return attend

    def _run(self, stack: Stack, tokens: Tensor, slots: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Compute every layer for new tokens, writing their keys and values; returns [tokens, hidden_size]."""
        config = self.config
        rows, eps = len(tokens), config.rms_norm_eps
        queries = config.num_attention_heads
        keys = queries + config.num_key_value_heads
        rotation = self._rotary[positions].unsqueeze(1)
        hidden = F.embedding(tokens, self._embedding)
        for index, layer in enumerate(stack.layers):
            qkv = layer.qkv(_rms_norm(hidden, layer.attention_norm, eps)).view(rows, -1, config.head_dim)
            pairs = torch.view_as_complex(qkv[:, :keys].float().unflatten(-1, (-1, 2)))
            rotated = torch.view_as_real(pairs * rotation).flatten(2).to(self._dtype)
            self._keys[index][slots, :, positions] = rotated[:, queries:]
            self._values[index][slots, :, positions] = qkv[:, keys:]
            hidden = hidden + layer.out(attend(index, rotated[:, :queries]).reshape(rows, -1))
            gate, up = layer.gate_up(_rms_norm(hidden, layer.mlp_norm, eps)).chunk(2, -1)
            hidden += layer.down(F.silu(gate).mul_(up))
        return hidden


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(hidden, weight.shape, weight, eps)


def _pair_rows(rows: Tensor, heads: int) -> Tensor:
    """Put dimension i + d/2 of each head beside dimension i, so that a rotation is one complex product."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
