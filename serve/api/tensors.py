"""Tensors of the Open Inference Protocol v2, as JSON or as bytes, to a model's items and back."""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.api.body import json_type, quoted
from serve.errors import InvalidInput, PredictionFailed
from serve.models.base import TensorSpec

Array = npt.NDArray[Any]
Rows = Sequence[Any] | Array

#: Datatype on the wire -> numpy's, little-endian as the binary extension has it.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_LENGTH = struct.Struct("<I")
_DEEPEST = 16
#: By kind of the wire's datatype: the types of its elements in parsed JSON.
_TYPES: dict[str, set[type]] = {"b": {bool}, "i": {int}, "u": {int}, "f": {int, float}}
_BOUNDS = {dtype: np.iinfo(dtype) for dtype in DTYPES.values() if dtype.kind in "iu"}


def read_shape(shape: object, spec: TensorSpec, place: str) -> tuple[int, ...]:
    """Return a tensor's shape, checked against what the model takes.

    Raises:
        InvalidInput: It is no list of whole numbers, has another rank or another fixed dimension, or has no row.
    """
    if type(shape) is not list:
        raise _no_shape(shape, place)
    for size in shape:
        if type(size) is not int or size < 0:
            raise _no_shape(shape, place)
    if len(shape) != len(spec.shape) or (
        len(shape) > 1 and any(want not in (-1, size) for size, want in zip(shape[1:], spec.shape[1:], strict=True))
    ):
        raise InvalidInput(
            f"is {quoted(shape)}, and {spec.name!r} takes {list(spec.shape)} (-1 is any length; items first)",
            place=f"{place}.shape",
        )
    if shape[0] == 0:
        raise InvalidInput("has no row; send at least one item", place=f"{place}.shape[0]")
    return tuple(shape)


def _no_shape(shape: object, place: str) -> InvalidInput:
    return InvalidInput(f"must be a list of whole numbers from 0, not {quoted(shape)}", place=f"{place}.shape")


def read_json(data: object, shape: tuple[int, ...], spec: TensorSpec, place: str) -> Rows:
    """Return the rows of a tensor whose data stands in the JSON, nested or flat and row-major.

    Raises:
        InvalidInput: An element does not fit the datatype, or there are more or fewer than the shape says.
    """
    place = f"{place}.data"
    if type(data) is not list:
        raise InvalidInput(f"must be a list, not {json_type(data)}", place=place)
    flat, nesting, types = _leaves(data, place)
    # numpy looks at no element before this: beside numbers, one long string makes it as many bytes for each of them.
    fitting: set[type] = {str} if spec.datatype == "BYTES" else _TYPES[DTYPES[spec.datatype].kind]
    if not types <= fitting:
        index = next(index for index, found in enumerate(map(type, flat)) if found not in fitting)
        raise _misfit(flat[index], spec, _element_place(place, index, nesting))
    if len(flat) != math.prod(shape) or (nesting is not None and len(nesting) > 1 and nesting != shape):
        raise _shape_mismatch(nesting, len(flat), shape, place)
    if nesting is None:
        raise InvalidInput(f"is nested unevenly, and the shape says {list(shape)}", place=place)
    if spec.datatype != "BYTES":
        return _numbers(flat, nesting, spec, place).reshape(shape)
    if spec.content == "base64":
        flat = [_from_base64(text, f"{place}[{index}]") for index, text in enumerate(flat)]
    return _bytes_rows(flat, shape)


def _leaves(data: list[Any], place: str) -> tuple[list[Any], tuple[int, ...] | None, set[type]]:
    """Return the elements of a nested list, how they are nested (None where the lengths differ), and their types."""
    sizes = [len(data)]
    is_even = True
    while list in (types := set(map(type, data))):
        if len(types) > 1:
            raise InvalidInput("holds lists beside elements; nest it evenly or send it flat", place=place)
        if len(sizes) > _DEEPEST:
            raise InvalidInput(f"is nested more than {_DEEPEST} levels deep", place=place)
        is_even = is_even and len(set(map(len, data))) == 1
        sizes.append(len(data[0]))
        data = list(chain.from_iterable(data))
    return data, tuple(sizes) if is_even else None, types


def _element_place(place: str, index: int, nesting: tuple[int, ...] | None) -> str:
    if nesting is None:
        return place
    indices: list[int] = []
    for size in reversed(nesting):
        index, inner = divmod(index, size)
        indices.append(inner)
    return place + "".join(f"[{inner}]" for inner in reversed(indices))


def _numbers(flat: list[Any], nesting: tuple[int, ...], spec: TensorSpec, place: str) -> Array:
    target = DTYPES[spec.datatype]
    # The type is named: numpy would choose float64 for whole numbers of which some take int64 and others uint64.
    parsed = np.float64 if target.kind == "f" else target
    try:
        with np.errstate(over="raise"):
            return np.array(flat, dtype=parsed).astype(target, copy=False)
    except (OverflowError, FloatingPointError) as error:
        low, high = _range(target)
        index = next(index for index, number in enumerate(flat) if not low <= number <= high)
        raise _misfit(flat[index], spec, _element_place(place, index, nesting)) from error


def _range(target: np.dtype[Any]) -> tuple[float, float]:
    if target.kind == "f":
        most = float(np.finfo(target).max)
        return -most, most
    return _BOUNDS[target].min, _BOUNDS[target].max


def _from_base64(text: str, place: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        hint = "; leave out the data: prefix" if text.startswith("data:") else ""
        raise InvalidInput(f"is not base64 ({error}): {text[:24]!r}{hint}", place=place) from error


def _bytes_rows(values: list[Any], shape: tuple[int, ...]) -> Rows:
    if len(shape) == 1:
        return values
    rows: Array = np.empty(len(values), dtype=object)
    rows[:] = values
    return rows.reshape(shape)


def _misfit(element: object, spec: TensorSpec, place: str) -> InvalidInput:
    """Return the error about an element that does not fit the datatype."""
    if spec.datatype == "BYTES":
        return InvalidInput(f"must be a string (datatype BYTES), not {json_type(element)}", place=place)
    if spec.datatype == "BOOL":
        reason = "is no boolean, and the datatype is"
    elif type(element) not in (int, float):
        reason = "is no number, and the datatype is"
    elif type(element) is float and DTYPES[spec.datatype].kind != "f" and abs(element) < 2**63:
        reason = "is no whole number, and the datatype is"
    else:
        reason = "is out of the range of"
    return InvalidInput(f"{quoted(element)} {reason} {spec.datatype}", place=place)


def _shape_mismatch(found: tuple[int, ...] | None, count: int, shape: tuple[int, ...], place: str) -> InvalidInput:
    nested = f" (nested as {list(found)})" if found is not None and len(found) > 1 else ""
    return InvalidInput(
        f"holds {count} elements{nested}, and the shape {list(shape)} has {math.prod(shape)}", place=place
    )


def read_binary(raw: memoryview, shape: tuple[int, ...], spec: TensorSpec, place: str) -> Rows:
    """Return the rows of a tensor whose data follows the JSON (binary tensor data extension), as views where possible.

    Raises:
        InvalidInput: The bytes are not as many as the shape and the datatype take.
    """
    if spec.datatype == "BYTES":
        return _bytes_rows(_read_binary_bytes(raw, math.prod(shape), place), shape)
    target = DTYPES[spec.datatype]
    want = math.prod(shape) * target.itemsize
    if len(raw) != want:
        raise InvalidInput(
            f"is {len(raw)}, and the shape {list(shape)} of {spec.datatype} takes {want} bytes",
            place=f"{place}.parameters.binary_data_size",
        )
    if target.kind == "b" and len(raw) and int(np.frombuffer(raw, dtype=np.uint8).max()) > 1:
        raise InvalidInput("BOOL is a byte of 0 or 1", place=place)
    return np.frombuffer(raw, dtype=target).reshape(shape)


def _read_binary_bytes(raw: memoryview, count: int, place: str) -> list[bytes]:
    values: list[bytes] = []
    offset, end = 0, len(raw)
    while offset < end:
        if offset + 4 > end:
            raise InvalidInput(f"the length of element {len(values)} is cut short", place=place)
        (size,) = _LENGTH.unpack_from(raw, offset)
        offset += 4
        if size > end - offset:
            raise InvalidInput(
                f"element {len(values)} should have {size} bytes, and {end - offset} are left", place=place
            )
        values.append(bytes(raw[offset : offset + size]))
        offset += size
    if len(values) != count:
        raise InvalidInput(f"holds {len(values)} elements, and the shape has {count}", place=place)
    return values


def read_raw(raw: memoryview, spec: TensorSpec) -> Rows:
    """Return the rows of a request that is nothing but one tensor's bytes (`Inference-Header-Content-Length: 0`).

    BYTES is one element without its length. Otherwise the rows are counted from the size; with one variable dimension
    beside the batch there is one row.

    Raises:
        InvalidInput: The size fits no shape of the tensor, or several.
    """
    if spec.datatype == "BYTES":
        if any(size not in (-1, 1) for size in spec.shape):
            raise InvalidInput(f"{spec.name!r} has more than one element; send a JSON header", place="body")
        return _bytes_rows([bytes(raw)], (1,) * len(spec.shape))
    variable = sum(size == -1 for size in spec.shape[1:])
    if variable > 1:
        raise InvalidInput(f"the shape {list(spec.shape)} cannot be told from a size; send a JSON header", place="body")
    fixed = math.prod(size for size in spec.shape[1:] if size != -1)
    count, rest = divmod(len(raw), fixed * DTYPES[spec.datatype].itemsize)
    if rest or not count:
        raise InvalidInput(f"{len(raw)} bytes are no whole tensor {list(spec.shape)} of {spec.datatype}", place="body")
    shape = tuple(count if size == -1 else size for size in spec.shape[1:])
    return read_binary(raw, (1, *shape) if variable else (count, *shape), spec, "body")


def stack(rows: Sequence[Any], spec: TensorSpec) -> Array | list[Any]:
    """Return the rows of an output as one tensor: an array, or for BYTES a list (of lists, of rank 2) of bytes or str.

    Raises:
        PredictionFailed: The model's rows do not fit together, or not the datatype or the shape of its signature.
    """
    if spec.datatype == "BYTES":
        values = [row.tolist() if isinstance(row, np.ndarray) else row for row in rows]
        if len({_length(value) for value in values}) > 1:
            raise _ragged(spec)
        shape, flat = _flatten(values)
        for value in flat:
            if not isinstance(value, (str, bytes, bytearray, memoryview)):
                raise PredictionFailed(
                    f"the model's output {spec.name!r} is no BYTES: {value!r:.60} is neither str nor bytes"
                )
        _check_output(tuple(shape), spec)
        return values
    try:
        tensor = np.asarray(rows, dtype=DTYPES[spec.datatype])
    except (ValueError, TypeError, OverflowError) as error:
        if len({np.shape(row) for row in rows}) > 1:
            raise _ragged(spec) from error
        raise PredictionFailed(f"the model's output {spec.name!r} is no {spec.datatype}: {error}") from error
    _check_output(tensor.shape, spec)
    return tensor


def _check_output(shape: tuple[int, ...], spec: TensorSpec) -> None:
    if len(shape) != len(spec.shape) or any(
        want not in (-1, size) for size, want in zip(shape, spec.shape, strict=True)
    ):
        raise PredictionFailed(
            f"the model's output {spec.name!r} has the shape {list(shape)}, and its signature says {list(spec.shape)}"
        )


def _length(value: object) -> int | None:
    return len(value) if isinstance(value, (list, tuple)) else None


def _ragged(spec: TensorSpec) -> PredictionFailed:
    return PredictionFailed(f"the rows of the output {spec.name!r} differ in shape; send one item a request")


def write_json(tensor: Array | list[Any], spec: TensorSpec) -> dict[str, Any]:
    """Return an output with its data in the JSON: flat and row-major; NaN and infinities, which JSON has not, as null.

    The data of a numeric output is still an array: the JSON writer reads it as it lies.
    """
    if isinstance(tensor, list):
        shape, flat = _flatten(tensor)
        tell: Callable[[Any], str] = _to_base64 if spec.content == "base64" else _to_text
        return {"name": spec.name, "datatype": "BYTES", "shape": shape, "data": [tell(value) for value in flat]}
    data = tensor if tensor.ndim == 1 and tensor.flags.c_contiguous else tensor.ravel()
    return {"name": spec.name, "datatype": spec.datatype, "shape": tensor.shape, "data": data}


def write_binary(tensor: Array | list[Any], spec: TensorSpec) -> tuple[dict[str, Any], bytes]:
    """Return an output without data and the bytes that follow the JSON for it."""
    if isinstance(tensor, list):
        shape, flat = _flatten(tensor)
        encoded = [value.encode() if isinstance(value, str) else bytes(value) for value in flat]
        raw = b"".join(_LENGTH.pack(len(value)) + value for value in encoded)
    else:
        shape, raw = list(tensor.shape), tensor.tobytes()
    parameters = {"binary_data_size": len(raw)}
    return {"name": spec.name, "datatype": spec.datatype, "shape": shape, "parameters": parameters}, raw


def _flatten(values: list[Any]) -> tuple[list[int], list[Any]]:
    shape = [len(values)]
    while values and isinstance(values[0], (list, tuple)):
        shape.append(len(values[0]))
        values = [element for value in values for element in value]
    return shape, values


def _to_text(value: str | bytes) -> str:
    if isinstance(value, str):
        return value
    try:
        return bytes(value).decode()
    except UnicodeDecodeError as error:
        raise PredictionFailed("the model's output is no UTF-8; ask for it as binary data") from error


def _to_base64(value: str | bytes) -> str:
    return base64.b64encode(value.encode() if isinstance(value, str) else value).decode()


def example_tensor(item: Mapping[str, Any], spec: TensorSpec) -> dict[str, Any]:
    """Return an input of one row with its data in the JSON, for documents."""
    value = item[spec.name]
    rows = [value] if isinstance(value, (str, bytes, bytearray)) else np.asarray(value)[None]
    if isinstance(rows, list):
        rows = [bytes(value) if isinstance(value, bytearray) else value]
    elif spec.datatype == "BYTES":
        rows = rows.tolist()
    else:
        rows = rows.astype(DTYPES[spec.datatype])
    tensor = write_json(rows, spec)
    data = tensor["data"]
    return tensor | {"shape": list(tensor["shape"]), "data": data.tolist() if isinstance(data, np.ndarray) else data}
