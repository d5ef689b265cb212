"""The BERT encoder's forward over safetensors, so that a replica needs neither `transformers` nor padding."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional as F  # noqa: N812

from serve.errors import LoadError

SUPPORTED = ("bert",)


@dataclass(frozen=True, slots=True)
class BertConfig:
    """The shape of a BERT encoder, from its config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float

    @classmethod
    def read(cls, folder: Path) -> BertConfig:
        """Read `folder/config.json`.

        Raises:
            LoadError: There is none, or it describes another architecture.
        """
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise LoadError(f"{path} cannot be read: {error}") from error
        expected = {
            "model_type": SUPPORTED,
            "hidden_act": ("gelu",),
            "position_embedding_type": ("absolute",),
        }
        for key, supported in expected.items():
            value = config.get(key, supported[0] if key != "model_type" else None)
            if value not in supported:
                raise LoadError(f"{path}: {key} {value!r} is not supported; supported: {', '.join(supported)}")
        try:
            return cls(**{name: config[name] for name in cls.__slots__})
        except KeyError as error:
            raise LoadError(f"{path} has no {error.args[0]!r}") from error


class Bert:
    """A BERT encoder without pooler, on packed tokens: [T, H] for all sequences of a batch, never padded."""

    def __init__(self, folder: Path, *, device: str, dtype: str) -> None:
        self.config = BertConfig.read(folder)
        self._device = torch.device(device)
        kind = getattr(torch, dtype)
        try:
            weights = load_file(folder / "model.safetensors", device=device)
        except Exception as error:
            raise LoadError(f"{folder / 'model.safetensors'} cannot be read: {error}") from error
        weights = {name.removeprefix("bert."): value.to(kind) for name, value in weights.items()}
        try:
            self._words = weights["embeddings.word_embeddings.weight"]
            self._positions = (
                weights["embeddings.position_embeddings.weight"]
                + (weights["embeddings.token_type_embeddings.weight"][0])
            )
            self._norm = _pair(weights, "embeddings.LayerNorm")
            self._layers = [_layer(weights, index) for index in range(self.config.num_hidden_layers)]
        except KeyError as error:
            raise LoadError(f"{folder / 'model.safetensors'} has no tensor {error.args[0]!r}") from error

    @torch.inference_mode()
    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Return the last hidden states [length, H] of each sequence of token ids."""
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        groups = [
            (length, len(list(members)))
            for length, members in itertools.groupby(len(sequences[index]) for index in order)
        ]
        ids = torch.tensor([token for index in order for token in sequences[index]], device=self._device)
        positions = torch.cat([self._positions[:length].repeat(count, 1) for length, count in groups])
        hidden = self._normalised(F.embedding(ids, self._words) + positions, self._norm)
        for layer in self._layers:
            attended = self._attention(F.linear(hidden, *layer["qkv"]), groups)
            hidden = self._normalised(F.linear(attended, *layer["out"]) + hidden, layer["norm1"])
            wide = F.gelu(F.linear(hidden, *layer["up"]))
            hidden = self._normalised(F.linear(wide, *layer["down"]) + hidden, layer["norm2"])
        parts = torch.split(hidden, [len(sequences[index]) for index in order])
        result: list[torch.Tensor] = [parts[0]] * len(parts)
        for index, part in zip(order, parts, strict=True):
            result[index] = part
        return result

    def _normalised(self, hidden: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.layer_norm(hidden, (self.config.hidden_size,), *norm, eps=self.config.layer_norm_eps)

    def _attention(self, qkv: torch.Tensor, groups: Sequence[tuple[int, int]]) -> torch.Tensor:
        heads, start, parts = self.config.num_attention_heads, 0, []
        for length, count in groups:
            rows = qkv[start : start + length * count].view(count, length, 3, heads, -1)
            query, key, value = rows.permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(query, key, value)
            parts.append(attended.transpose(1, 2).reshape(length * count, self.config.hidden_size))
            start += length * count
        return torch.cat(parts)


def _pair(weights: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def _layer(weights: dict[str, torch.Tensor], index: int) -> dict[str, Any]:
    at = f"encoder.layer.{index}"
    qkv = [_pair(weights, f"{at}.attention.self.{part}") for part in ("query", "key", "value")]
    return {
        "qkv": tuple(torch.cat(parts) for parts in zip(*qkv, strict=True)),
        "out": _pair(weights, f"{at}.attention.output.dense"),
        "norm1": _pair(weights, f"{at}.attention.output.LayerNorm"),
        "up": _pair(weights, f"{at}.intermediate.dense"),
        "down": _pair(weights, f"{at}.output.dense"),
        "norm2": _pair(weights, f"{at}.output.LayerNorm"),
    }
