"""The BERT encoder on each device's fastest engine of equal outputs, without `transformers`, for one fast replica.

On a CPU it is CTranslate2: its GEMM is as near to the processor's peak as any (MKL's, oneDNN's, OpenBLAS's and MLAS's
are within a tenth of each other), it spends the least on what lies between the GEMMs, it holds no GIL, and it spares
a replica the import of torch. On a GPU it is torch, whose wheel brings the CUDA libraries that it needs.
"""

from __future__ import annotations

import hashlib
import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from serve.cache import build_once
from serve.errors import LoadError

if TYPE_CHECKING:
    import torch

Pooling = Literal["mean", "cls"]
Floats = NDArray[np.float32]
Layout = dict[str, tuple[list[str], tuple[int, ...]]]

#: Padded tokens in one call of CTranslate2: enough for full GEMM speed, few enough that intermediates stay in cache.
_GROUP_TOKENS = 512

#: Longest over shortest sequence of one such call: attention is computed on padded sequences.
_GROUP_RATIO = 1.25

#: Version of CTranslate2's format of a model.
_FORMAT = 6

_SUPPORTED: Mapping[str, str] = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}


@dataclass(frozen=True, slots=True)
class BertConfig:
    """The shape of a BERT encoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @classmethod
    def read(cls, folder: Path) -> BertConfig:
        """Read `folder/config.json`.

        Raises:
            LoadError: There is none, it is damaged, or it describes another architecture.
        """
        path = folder / "config.json"
        try:
            config = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise LoadError(f"{path} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise LoadError(f"{path} holds no JSON object")
        for key, supported in _SUPPORTED.items():
            value = config.get(key, None if key == "model_type" else supported)
            if value != supported:
                raise LoadError(f"{path}: {key} is {value!r}; text-embedding supports {supported!r}")
        for field in fields(cls):
            value = config.get(field.name)
            if type(value) is not (float if field.type == "float" else int) or value <= 0:
                raise LoadError(f"{path}: {field.name} is {value!r}; a positive number is wanted")
        if config["hidden_size"] % config["num_attention_heads"]:
            raise LoadError(f"{path}: hidden_size is no multiple of num_attention_heads")
        return cls(**{field.name: config[field.name] for field in fields(cls)})


class Bert(ABC):
    """A BERT encoder, pooled."""

    def __init__(self, config: BertConfig) -> None:
        self.config = config

    @abstractmethod
    def pooled(self, sequences: Sequence[Sequence[int]], pooling: Pooling) -> Floats:
        """Return float32 [n, hidden_size]: the mean, or the first, of each id sequence's last hidden states."""


def load_bert(folder: Path, *, device: str, dtype: str, threads: int, cache_dir: Path) -> Bert:
    """Load config.json and model.safetensors of `folder` for `device`.

    Raises:
        LoadError: A file is absent or damaged, or the architecture is not supported.
    """
    config = BertConfig.read(folder)
    if device == "cuda":
        return TorchBert(config, folder / "model.safetensors", device=device, dtype=dtype)
    return CTranslate2Bert(config, folder / "model.safetensors", dtype=dtype, threads=threads, cache_dir=cache_dir)


class CTranslate2Bert(Bert):
    """BERT on CTranslate2, whose own file of the weights is written once into `cache_dir`."""

    def __init__(self, config: BertConfig, weights: Path, *, dtype: str, threads: int, cache_dir: Path) -> None:
        import ctranslate2

        super().__init__(config)
        key = f"bert-ctranslate2-{_FORMAT}/{_digest(config, weights)}"
        converted = build_once(cache_dir, key, lambda folder: _convert(config, weights, folder))
        try:
            self._encoder = ctranslate2.Encoder(str(converted), compute_type=dtype, intra_threads=threads)
        except (RuntimeError, ValueError) as error:
            raise LoadError(f"CTranslate2 does not load {converted}, made from {weights}: {error}") from error

    def pooled(self, sequences: Sequence[Sequence[int]], pooling: Pooling) -> Floats:
        """As `Bert.pooled`."""
        rows = np.empty((len(sequences), self.config.hidden_size), np.float32)
        for group in grouped_by_length([len(sequence) for sequence in sequences]):
            output = self._encoder.forward_batch([sequences[index] for index in group])
            states = np.asarray(output.last_hidden_state)
            if pooling == "cls":
                rows[group] = states[:, 0]
            elif len(sequences[group[0]]) == len(sequences[group[-1]]):
                rows[group] = states.mean(axis=1)
            else:
                for index, state in zip(group, states, strict=True):
                    rows[index] = state[: len(sequences[index])].mean(axis=0)
        return rows


class TorchBert(Bert):
    """BERT on torch: linear layers on the packed tokens [T, H], attention on the padded sequences [n, L, H]."""

    def __init__(self, config: BertConfig, weights: Path, *, device: str, dtype: str) -> None:
        import torch

        super().__init__(config)
        self._device = torch.device(device)
        kind = getattr(torch, dtype)
        self._tensors = {
            name: torch.from_numpy(array).to(self._device, kind)
            for name, array in read_tensors(config, weights).items()
        }

    def pooled(self, sequences: Sequence[Sequence[int]], pooling: Pooling) -> Floats:
        """As `Bert.pooled`."""
        import torch

        lengths = np.array([len(sequence) for sequence in sequences])
        present = np.arange(lengths.max()) < lengths[:, None]
        ids = np.fromiter((token for sequence in sequences for token in sequence), np.int64, int(lengths.sum()))
        positions = np.nonzero(present)[1]
        with torch.inference_mode():
            mask = self._on_device(present)
            padded = self._padded(self._hidden(self._on_device(ids), self._on_device(positions), mask), mask).float()
            rows = padded[:, 0] if pooling == "cls" else padded.sum(dim=1) / self._on_device(lengths)[:, None]
            result: Floats = rows.cpu().numpy()
        return result

    def _on_device(self, array: NDArray[Any]) -> torch.Tensor:
        import torch

        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states [T, H] of the packed tokens."""
        from torch.nn import functional

        tensors = self._tensors
        words = functional.embedding(ids, tensors["embeddings_0/weight"])
        kinds = tensors["embeddings_1/weight"][0]
        places = functional.embedding(positions, tensors["position_encodings/encodings"])
        hidden = self._normalised(words + kinds + places, "layernorm_embedding")
        for index in range(self.config.num_hidden_layers):
            at, ffn = f"layer_{index}/self_attention", f"layer_{index}/ffn"
            attended = self._attention(self._linear(hidden, f"{at}/linear_0"), mask)
            hidden = self._normalised(hidden + self._linear(attended, f"{at}/linear_1"), f"{at}/layer_norm")
            wide = functional.gelu(self._linear(hidden, f"{ffn}/linear_0"))
            hidden = self._normalised(hidden + self._linear(wide, f"{ffn}/linear_1"), f"{ffn}/layer_norm")
        return hidden

    def _linear(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        from torch.nn import functional

        return functional.linear(hidden, self._tensors[f"{name}/weight"], self._tensors[f"{name}/bias"])

    def _normalised(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        from torch.nn import functional

        gamma, beta = self._tensors[f"{name}/gamma"], self._tensors[f"{name}/beta"]
        return functional.layer_norm(hidden, (self.config.hidden_size,), gamma, beta, self.config.layer_norm_eps)

    def _attention(self, qkv: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Attend within each sequence: qkv [T, 3 H], mask [n, L], true where there is a token -> [T, H]."""
        from torch.nn import functional

        count, longest = mask.shape
        split = self._padded(qkv, mask).view(count, longest, 3, self.config.num_attention_heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        return attended.transpose(1, 2).reshape(count, longest, self.config.hidden_size)[mask]

    def _padded(self, packed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        padded = packed.new_zeros((*mask.shape, packed.shape[-1]))
        padded[mask] = packed
        return padded


def grouped_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Return the indices of all sequences, shortest first, in groups that waste little on padding."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        if (
            not groups
            or length > _GROUP_RATIO * lengths[groups[-1][0]]
            or length * (len(groups[-1]) + 1) > _GROUP_TOKENS
        ):
            groups.append([])
        groups[-1].append(index)
    return groups


def read_tensors(config: BertConfig, weights: Path) -> dict[str, Floats]:
    """Return the encoder's float32 tensors under CTranslate2's names, query, key and value in one.

    Raises:
        LoadError: The file is absent or damaged, or a tensor is missing or of another shape or type.
    """
    try:
        with safe_open(weights, framework="numpy") as file:
            prefix = "bert." if "bert.embeddings.LayerNorm.weight" in file.keys() else ""  # noqa: SIM118
            arrays = {}
            for name, (sources, shape) in _layout(config).items():
                array = np.concatenate([file.get_tensor(prefix + source) for source in sources])
                if array.shape != shape or array.dtype not in (np.float32, np.float16):
                    raise LoadError(
                        f"{weights}: {' + '.join(sources)} is {array.dtype} {array.shape}; "
                        f"float32 or float16 {shape} is wanted"
                    )
                arrays[name] = array.astype(np.float32, copy=False)
    except (OSError, SafetensorError, TypeError) as error:
        raise LoadError(f"{weights} cannot be read: {error}") from error
    return arrays


def _layout(config: BertConfig) -> Layout:
    """Return, under CTranslate2's name of each tensor, the published names that make it and its shape."""
    size, wide = config.hidden_size, config.intermediate_size
    tables = {
        "embeddings_0/weight": ("word_embeddings", config.vocab_size),
        "embeddings_1/weight": ("token_type_embeddings", config.type_vocab_size),
        "position_encodings/encodings": ("position_embeddings", config.max_position_embeddings),
    }
    layout: Layout = {name: ([f"embeddings.{part}.weight"], (rows, size)) for name, (part, rows) in tables.items()}
    layout |= _norm("layernorm_embedding", "embeddings.LayerNorm", size)
    for index in range(config.num_hidden_layers):
        ours, theirs = f"layer_{index}", f"encoder.layer.{index}"
        qkv = [f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")]
        layout |= _linear(f"{ours}/self_attention/linear_0", qkv, (3 * size, size))
        layout |= _linear(f"{ours}/self_attention/linear_1", [f"{theirs}.attention.output.dense"], (size, size))
        layout |= _norm(f"{ours}/self_attention/layer_norm", f"{theirs}.attention.output.LayerNorm", size)
        layout |= _linear(f"{ours}/ffn/linear_0", [f"{theirs}.intermediate.dense"], (wide, size))
        layout |= _linear(f"{ours}/ffn/linear_1", [f"{theirs}.output.dense"], (size, wide))
        layout |= _norm(f"{ours}/ffn/layer_norm", f"{theirs}.output.LayerNorm", size)
    return layout


def _linear(name: str, sources: list[str], shape: tuple[int, int]) -> Layout:
    return {
        f"{name}/weight": ([f"{source}.weight" for source in sources], shape),
        f"{name}/bias": ([f"{source}.bias" for source in sources], shape[:1]),
    }


def _norm(name: str, source: str, size: int) -> Layout:
    return {f"{name}/gamma": ([f"{source}.weight"], (size,)), f"{name}/beta": ([f"{source}.bias"], (size,))}


def _digest(config: BertConfig, weights: Path) -> str:
    try:
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise LoadError(f"{weights} cannot be read: {error}") from error
    digest.update(repr(config).encode())
    return digest.hexdigest()[:32]


def _convert(config: BertConfig, weights: Path, folder: Path) -> None:
    """Write CTranslate2's model folder; its own converter would import torch.

    Its format, little-endian: version, name and revision of the specification; the count of variables, and of each the
    name, dimensions, type (0 float32, 1 int8, 2 int16), size in bytes and bytes; the count of aliases.
    Source: https://github.com/OpenNMT/CTranslate2, python/ctranslate2/specs/model_spec.py, `ModelSpec._serialize`.
    """
    variables: dict[str, NDArray[Any]] = {
        "activation": np.array(3, np.int8),  # the exact GELU
        "embeddings_merge": np.array(1, np.int8),  # their sum
        "multi_query_attention": np.array(0, np.int8),
        "num_heads": np.array(config.num_attention_heads, np.int16),
        "pre_norm": np.array(0, np.int8),
        "scale_embeddings": np.array(0, np.int8),
        **read_tensors(config, weights),
    }
    kinds = {"float32": 0, "int8": 1, "int16": 2}
    with (folder / "model.bin").open("wb") as file:
        file.write(struct.pack("<I", _FORMAT) + _text("TransformerEncoderSpec") + struct.pack("<II", 1, len(variables)))
        for name, array in variables.items():
            shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
            file.write(_text(f"encoder/{name}") + shape + struct.pack("<BI", kinds[array.dtype.name], array.nbytes))
            file.write(array.tobytes())
        file.write(struct.pack("<I", 0))
    # It is given token ids: of the vocabulary it needs no more than a name for each.
    names = [str(token) for token in range(config.vocab_size)]
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), names[0])
    (folder / "config.json").write_text(json.dumps({"layer_norm_epsilon": config.layer_norm_eps, **special}))
    (folder / "vocabulary.json").write_text(json.dumps(names))


def _text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"
