"""A lean forward of the llama family over slots of a preallocated cache, because start-up and small batches are all
overhead in a general library.

Names follow the Hugging Face layout of weights. Sources: LLaMA (arXiv:2302.13971), grouped-query attention
(arXiv:2305.13245), rotary embeddings (arXiv:2104.09864), Llama 3.1's rotary scaling (its config's `rope_type: llama3`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError, safe_open
from torch import Tensor

from serve.errors import LoadError
from serve.models.few_rows import FewRows

SUPPORTED = ("llama", "mistral", "qwen2")

_FEW = 32  # rows up to which torch's own product, which reorders the weights first, takes longer

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
            raw = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise LoadError(f"config.json of the model is not readable: {error}") from error
        if not isinstance(raw, dict):
            raise LoadError(f"config.json of the model is not an object but {type(raw).__name__}")
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
                rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
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
    try:
        factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
        trained = scaling["original_max_position_embeddings"]
    except KeyError as error:
        raise LoadError(f"config.json of the model lacks {error.args[0]!r} in its rope scaling") from error
    turns = trained * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    blended: Tensor = frequency * keep + frequency / factor * (1 - keep)
    return blended


class Weights:
    """The tensors of a folder, mapped from model.safetensors or from the files of its index, each read at most once."""

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, Tensor] = {}
        for name in _weight_files(folder):
            try:
                with safe_open(folder / name, framework="pt") as file:
                    self._tensors.update((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise LoadError(f"{name} of the model is not readable: {error}") from error

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor. Raises `LoadError` where it is absent or of another shape."""
        if name not in self._tensors:
            raise LoadError(f"the model's files lack the tensor {name}")
        tensor: Tensor = self._tensors.pop(name)
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


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoadError(f"{index.name} of the model has no usable weight_map: {error!r}") from error


class Norm:
    """Root-mean-square norm (arXiv:1910.07467).

    In float32 it is written as few operators, because a decode step of few rows mostly waits for those of the
    library's: w x / sqrt(mean(x^2) + eps) = (w sqrt(n)) x / hypot(|x|, sqrt(n eps)).
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight, self._eps = weight, eps
        size = torch.tensor(len(weight), dtype=weight.dtype, device=weight.device)
        self._scaled, self._floor = weight * size.sqrt(), (size * eps).sqrt()

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the normed rows of [rows, hidden_size]."""
        if hidden.dtype != torch.float32:
            return F.rms_norm(hidden, self._weight.shape, self._weight, self._eps)
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        return torch.mul(hidden, self._scaled).div_(length.hypot_(self._floor))


class Dense:
    """A linear map.

    Args:
        weight: [outputs, width].
        bias: [outputs], or None.
        halves: Hold a float32 weight in float16 too, for few rows: half the bytes of what bounds those.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, halves: bool = False) -> None:
        self.weight, self.bias = weight, bias
        self._few: FewRows | None = None
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and FewRows.takes(weight):
            few = weight.half() if halves else weight
            self._few = FewRows(few, bias, threads=torch.get_num_threads())

    def __call__(self, rows: Tensor) -> Tensor:
        """Return `rows @ weight.T + bias`."""
        if self._few is not None and len(rows) <= _FEW:
            return self._few(rows)
        return F.linear(rows, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer block; the linears are q, k, v in one and gate, up in one."""

    attention_norm: Norm
    qkv: Dense
    out: Dense
    mlp_norm: Norm
    gate_up: Dense
    down: Dense


@dataclass(frozen=True, slots=True)
class Stack:
    """What turns embeddings into logits."""

    layers: Sequence[Layer]
    norm: Norm
    head: Dense


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one sequence that are read together.

    Args:
        slot: Where the sequence is.
        start: Tokens that the slot holds already; these are written after them.
    """

    tokens: Sequence[int]
    slot: int
    start: int


class Llama:
    """A model of the llama family and the key/value cache of its slots.

    Args:
        folder: config.json and safetensors in the Hugging Face layout.
        device: A torch device.
        dtype: Type of weights, activations and cache; float16 on a CPU is that of the weights alone.
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
        self._halves = device == "cpu" and dtype == torch.float16
        self._dtype = torch.float32 if self._halves else dtype
        self._rotary = rotary_table(config, context_tokens).to(self.device)
        weights = Weights(folder)
        embedding = self._place(weights.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size))
        head = embedding
        if not config.tie_word_embeddings:
            head = self._place(weights.take("lm_head.weight", config.vocab_size, config.hidden_size))
        norm = self._norm(weights.take("model.norm.weight", config.hidden_size))
        layers = []
        for index in range(config.num_hidden_layers):
            layers.append(self._read_layer(weights, index))
            progress("reading layers", index + 1, config.num_hidden_layers)
        weights.finish()
        self._embedding = embedding
        self._stack = Stack(layers, norm, self._dense(head))
        # [layers, keys and values, slots, heads, positions, head_dim]
        shape = (config.num_hidden_layers, 2, slots, config.num_key_value_heads, context_tokens, config.head_dim)
        self._cache = self._zeros(shape)
        self._cache_rows = self._cache.view(shape[0], -1, config.head_dim).unbind(0)
        strides = torch.tensor(self._cache.stride()[1:4], device=self.device) // config.head_dim
        parts, heads = torch.meshgrid(torch.arange(2), torch.arange(shape[3]), indexing="ij")
        #: Where a token's keys and values of slot 0, position 0 are, as rows of a layer's cache.
        self._first_rows = parts.flatten().to(self.device) * strides[0] + heads.flatten().to(self.device) * strides[2]
        self._slot_rows = int(strides[1])

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self._dtype)

    def _dense(self, weight: Tensor, bias: Tensor | None = None) -> Dense:
        return Dense(self._place(weight), None if bias is None else self._place(bias), halves=self._halves)

    def _norm(self, weight: Tensor) -> Norm:
        return Norm(self._place(weight), self.config.rms_norm_eps)

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Return zeros; on a CPU, small pages are taken as they are written, so that memory follows the tokens held."""
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self._dtype, device=self.device)
        pages = mmap(-1, math.prod(shape) * self._dtype.itemsize, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=self._dtype).view(shape)

    def _read_layer(self, weights: Weights, index: int) -> Layer:
        config, prefix = self.config, f"model.layers.{index}."
        hidden, inner = config.hidden_size, config.intermediate_size
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        parts, biases = [], []
        for part, count in zip("qkv", heads, strict=True):
            name, size = f"{prefix}self_attn.{part}_proj", count * config.head_dim
            order = _paired(count, config.head_dim) if part in "qk" else slice(None)
            parts.append(weights.take(f"{name}.weight", size, hidden)[order])
            if f"{name}.bias" in weights:
                biases.append(weights.take(f"{name}.bias", size)[order])
        gate_up = [weights.take(f"{prefix}mlp.{part}_proj.weight", inner, hidden) for part in ("gate", "up")]
        out = weights.take(f"{prefix}self_attn.o_proj.weight", hidden, heads[0] * config.head_dim)
        return Layer(
            attention_norm=self._norm(weights.take(f"{prefix}input_layernorm.weight", hidden)),
            qkv=self._dense(torch.cat(parts), torch.cat(biases) if biases else None),
            out=self._dense(out),
            mlp_norm=self._norm(weights.take(f"{prefix}post_attention_layernorm.weight", hidden)),
            gate_up=self._dense(torch.cat(gate_up)),
            down=self._dense(weights.take(f"{prefix}mlp.down_proj.weight", hidden, inner)),
        )

    @torch.inference_mode()
    def wipe(self, slot: int, *, count: int) -> None:
        """Zero the first `count` positions of a slot; what is no number would spread to the slot's next sequence."""
        self._cache[:, :, slot, :, :count] = 0

    @torch.inference_mode()
    def prefill(self, pieces: Sequence[Piece]) -> Tensor:
        """Put pieces of prompts into the cache, of several slots at once because wide products are cheaper a row.

        Returns:
            Logits of each piece's last token, float32 [pieces, vocab_size].
        """
        hidden = self._read(pieces)
        ends = torch.tensor([len(piece.tokens) for piece in pieces]).cumsum(0) - 1
        return self._logits(hidden[ends.to(self.device)])

    def _read(self, pieces: Sequence[Piece]) -> Tensor:
        counts = [len(piece.tokens) for piece in pieces]
        attentions = [self._piece_attention(piece) for piece in pieces]

        def attend(layer: int, queries: Tensor) -> Tensor:
            parts: Sequence[Tensor] = queries.split_with_sizes(counts)
            return torch.cat([attention(layer, part) for attention, part in zip(attentions, parts, strict=True)])

        positions = torch.cat([torch.arange(piece.start, piece.start + len(piece.tokens)) for piece in pieces])
        rows = positions + torch.tensor([piece.slot * self._slot_rows for piece in pieces]).repeat_interleave(
            torch.tensor(counts)
        )
        tokens = torch.tensor([token for piece in pieces for token in piece.tokens])
        tokens, positions, rows = (part.to(self.device) for part in (tokens, positions, rows))
        return self._run(tokens, positions, rows, attend)

    def _piece_attention(self, piece: Piece) -> Attend:
        count, end = len(piece.tokens), piece.start + len(piece.tokens)
        mask = torch.ones(count, end, dtype=torch.bool, device=self.device).tril(piece.start)
        keys, values = (self._cache[:, part, piece.slot : piece.slot + 1, :, :end].unbind(0) for part in (0, 1))

        def attend(layer: int, queries: Tensor) -> Tensor:
            heads_first = queries.transpose(0, 1).unsqueeze(0)
            mixed = F.scaled_dot_product_attention(
                heads_first, keys[layer], values[layer], attn_mask=mask, enable_gqa=True
            )
            return mixed[0].transpose(0, 1)

        return attend

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], *, slots: Sequence[int], starts: Sequence[int]) -> Tensor:
        """Put one token into each of several slots.

        Args:
            tokens: The new token of each row.
            slots: The slot of each row, ascending.
            starts: Tokens that each row's slot holds already; the new one is written after them.

        Returns:
            Logits, float32 [rows, vocab_size].
        """
        positions = torch.tensor(starts, device=self.device)
        rows = positions + torch.tensor(slots, device=self.device) * self._slot_rows
        attend = self._decode_attention(slots, starts)
        hidden = self._run(torch.tensor(tokens, device=self.device), positions, rows, attend)
        return self._logits(hidden)

    def _decode_attention(self, slots: Sequence[int], starts: Sequence[int]) -> Attend:
        """Attend over the span of slots from the lowest to the highest row's, as far as the longest row goes.

        The queries that share a key/value head are the rows of one small product. Slots of the span that have no row
        compute one position, which nobody reads.
        """
        low, high, longest = slots[0], slots[-1] + 1, max(starts) + 1
        layers, _, _, groups, context, head_dim = self._cache.shape
        span = high - low
        shape = (layers, span * groups, context, head_dim)
        keys, values = (self._cache[:, part, low:high].view(shape)[:, :, :longest] for part in (0, 1))
        keys_of, values_of = keys.transpose(2, 3).unbind(0), values.unbind(0)
        lengths = torch.ones(span, dtype=torch.long)
        where = torch.tensor(slots) - low
        lengths[where] = torch.tensor(starts) + 1
        beyond = torch.arange(longest) >= lengths.repeat_interleave(groups)[:, None, None]
        mask = torch.zeros(beyond.shape, dtype=self._dtype).masked_fill_(beyond, -math.inf).to(self.device)
        gaps = where.to(self.device) if span != len(slots) else None
        scale = head_dim**-0.5

        def attend(layer: int, queries: Tensor) -> Tensor:
            if gaps is not None:
                queries = queries.new_zeros(span, *queries.shape[1:]).index_copy_(0, gaps, queries)
            scores = torch.baddbmm(mask, queries.reshape(span * groups, -1, head_dim), keys_of[layer], alpha=scale)
            mixed = torch.bmm(torch.softmax(scores, -1), values_of[layer]).view(span, -1)
            return mixed if gaps is None else mixed[gaps]

        return attend

    def _run(self, tokens: Tensor, positions: Tensor, rows: Tensor, attend: Attend) -> Tensor:
        """Compute every layer for new tokens.

        Args:
            tokens: int64 [tokens].
            positions: int64 [tokens], each token's place in its sequence.
            rows: int64 [tokens], each token's row in `_cache_rows` counted from `_first_rows`.
            attend: The attention over the cache, which holds the new keys and values when it is called.

        Returns:
            [tokens, hidden_size], before the last norm.
        """
        config = self.config
        count = len(tokens)
        queries = config.num_attention_heads
        keys = queries + config.num_key_value_heads
        rotation = self._rotary[positions].unsqueeze(1)
        written = (rows[:, None] + self._first_rows).flatten()
        hidden = F.embedding(tokens, self._embedding)
        for index, layer in enumerate(self._stack.layers):
            heads = layer.qkv(layer.attention_norm(hidden)).view(count, -1, config.head_dim)
            _rotate(heads[:, :keys], rotation)
            self._cache_rows[index].index_copy_(0, written, heads[:, queries:].reshape(-1, config.head_dim))
            hidden += layer.out(attend(index, heads[:, :queries]).reshape(count, -1))
            gate, up = layer.gate_up(layer.mlp_norm(hidden)).chunk(2, -1)
            hidden += layer.down(F.silu(gate).mul_(up))
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._stack.head(self._stack.norm(hidden))
        return logits.float()


def _rotate(heads: Tensor, rotation: Tensor) -> None:
    """Turn each pair of neighbouring dimensions, in place: [tokens, heads, head_dim] by [tokens, 1, head_dim / 2]."""
    pairs = (*heads.shape[:-1], -1, 2)
    if heads.dtype == torch.float32:
        torch.view_as_complex(heads.view(pairs)).mul_(rotation)
    else:
        turned = torch.view_as_complex(heads.float().view(pairs)) * rotation
        heads.copy_(torch.view_as_real(turned).flatten(2))


def _paired(heads: int, head_dim: int) -> Tensor:
    """Return an order of rows with dimension i + d/2 of each head beside i, so that a rotation is a complex product."""
    return torch.arange(heads * head_dim).view(heads, 2, head_dim // 2).transpose(1, 2).flatten()
