"""What a model is to everything above it: a class with `load` and `predict`, and what it may add to those."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BYTES",
]  # fmt: skip

#: One row of a request: tensor name -> an array without the batch dimension, a numpy scalar, or `bytes` for BYTES.
#: Keys that are no tensor of the signature carry what a protocol knows beyond tensors (`messages` of a chat).
Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor of the Open Inference Protocol v2.

    Args:
        name: Its name on the wire.
        datatype: Its datatype on the wire.
        shape: Dimensions, the batch first; -1 is any length.
        description: What it means, with units.
        optional: A request may leave it out (inputs only).
        content: `base64` where a JSON string holds encoded bytes (a picture, a sound file); else it is UTF-8.
    """

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    description: str
    optional: bool = False
    content: Literal["text", "base64"] = "text"


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model takes and gives.

    Args:
        parameters: Request parameters that the model reads, each with its meaning; any other one is refused.
        example: One item that the model answers; documents and warm-up use it.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)
    example: Item | None = None

    @classmethod
    def of(
        cls,
        inputs: Mapping[str, str],
        outputs: Mapping[str, str],
        *,
        parameters: Mapping[str, str] | None = None,
        example: Item | None = None,
    ) -> Signature:
        """Return a signature whose tensors are written as text: `{"image": "BYTES [-1] base64: a photograph"}`.

        Args:
            inputs: Name -> datatype, shape with the batch first, `base64` and `optional` where they apply, and after a
                colon the meaning.
            outputs: As `inputs`.

        Raises:
            ValueError: A text is not of that form.
        """
        return cls(
            inputs=tuple(_parse_tensor(name, text) for name, text in inputs.items()),
            outputs=tuple(_parse_tensor(name, text) for name, text in outputs.items()),
            parameters=parameters or {},
            example=example,
        )


_TENSOR = re.compile(
    r"(?P<datatype>\w+) *\[(?P<shape>[-\d, ]+)\](?P<base64> +base64)?(?P<optional> +optional)?(?: *:(?P<meaning>.*))?",
    re.ASCII | re.DOTALL,
)


def _parse_tensor(name: str, text: str) -> TensorSpec:
    parts = _TENSOR.fullmatch(text)
    sizes = [size.strip() for size in parts["shape"].split(",")] if parts else []
    known = parts is not None and parts["datatype"] in get_args(Datatype)
    if not parts or not known or not all(re.fullmatch(r"-1|\d+", size, re.ASCII) for size in sizes):
        raise ValueError(
            f"tensor {name!r} is {text!r}; a datatype ({', '.join(get_args(Datatype))}) and a shape are wanted, "
            "such as 'FP32 [-1, 3]: what it means'"
        )
    return TensorSpec(
        name,
        parts["datatype"],  # type: ignore[arg-type]
        tuple(map(int, sizes)),
        (parts["meaning"] or "").strip(),
        optional=parts["optional"] is not None,
        content="base64" if parts["base64"] else "text",
    )


@dataclass(frozen=True, slots=True)
class LoadContext:
    """What a model gets to load itself.

    Args:
        folder: The source, a verified local folder (or the folder of the single file that the source names).
        options: The task's options.
        device: `cpu` or `cuda`, already decided.
        dtype: `float32`, `bfloat16` or `float16`, already decided.
        threads: Compute threads that the model may use.
        max_batch_size: Items that `predict` will get at most.
        cache_dir: For what is converted once: `serve.cache.build_once(cache_dir, key, build)`.
        progress: Called with (what, done, total), total 0 where unknown.
        file: The single file that the source names, where it names one.
        gpus: GPUs that are reserved for the model; below 1, its share of one.
    """

    folder: Path
    options: Any
    device: str
    dtype: str
    threads: int
    max_batch_size: int
    cache_dir: Path
    progress: Callable[[str, int, int], None]
    file: Path | None = None
    gpus: float = 0.0


@runtime_checkable
class Model(Protocol):
    """The least that a model is; all methods are called on threads of their own, never on the event loop.

    A model may add:
        `prepare(item) -> prepared`: decode or tokenise one item ahead of `predict`, on a thread of its own, several at
            a time; raises `InvalidInput`. Without it, `predict` gets the items themselves.
        `cost(prepared) -> int`: the item's cost in the unit of `batching.max_batch_cost`; without it, 1.
        `padded: bool`: true where a batch costs its size times its longest item; else it costs their sum.
        `stream(prepared) -> Iterator[dict]`: the answer in parts.
        `close()`: give back what `load` took.
    """

    signature: Signature

    def load(self, context: LoadContext) -> None:
        """Load weights; afterwards `signature` is final. Raises `LoadError`."""

    def predict(self, batch: Sequence[Any]) -> Sequence[Mapping[str, Any] | Exception]:
        """Answer a batch: as many results as items, in order, each the output tensors of one row, or its exception.

        Called from one thread, one batch at a time. If it raises, halves of the batch are run to find the bad item.
        """


@dataclass(slots=True)
class Step:
    """What one step of a stepped model gave one stream.

    Args:
        key: The stream, as `admit` named it.
        output: A part of the answer (for text: `text`, `token_ids`), or None for none yet.
        done: No more follows; the slot is free.
        error: The stream failed; implies done.
    """

    key: int
    output: dict[str, Any] | None
    done: bool = False
    error: Exception | None = None


@runtime_checkable
class SteppedModel(Protocol):
    """A model that computes many streams together, a step at a time (continuous batching); all calls on one thread.

    It may add `close()` as `Model` may, and `broken: bool`, true once it can answer nothing more: its replica is then
    replaced.
    """

    signature: Signature
    slots: int

    def load(self, context: LoadContext) -> None:
        """As `Model.load`."""

    def prepare(self, item: Item) -> Any:
        """Tokenise and check one item; on another thread. Raises `InvalidInput`."""

    def admit(self, prepared: Any) -> int:
        """Take a stream into a free slot and return its key; the prompt may be computed here or in `step`."""

    def step(self) -> Sequence[Step]:
        """Compute one step of every admitted stream."""

    def release(self, key: int) -> None:
        """Free a slot before its stream is done (its caller left)."""
