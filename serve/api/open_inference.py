"""The Open Inference Protocol v2 of one model: what a request says, and the documents about the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import orjson

from serve.api import tensors
from serve.api.body import json_type, parse_object, quoted, read_length
from serve.api.directory import LONGEST_NEAR, version_of
from serve.api.wire import JSON_HEADER, Headers
from serve.errors import InvalidInput, PayloadTooLarge, PredictionFailed, UnsupportedParameter
from serve.models.base import Signature, TensorSpec
from serve.spec import ModelSpec

HEADER_LENGTH = b"inference-header-content-length"
_REQUEST_KEYS = frozenset(("id", "parameters", "inputs", "outputs", "model_name", "model_version"))
_INPUT_KEYS = frozenset(("name", "shape", "datatype", "parameters", "data"))
_NEEDED_KEYS = frozenset(("name", "shape", "datatype"))
_OUTPUT_KEYS = frozenset(("name", "parameters"))
# Triton's request parameters, with the value under which leaving them out changes nothing.
_UNUSED = {"sequence_id": (0, ""), "sequence_start": (False,), "sequence_end": (False,), "priority": (0,)}


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One parsed request.

    Args:
        items: One a row, as `serve.models.base.Item`.
        id: What the answer repeats.
        outputs: The outputs to answer with, and whether each follows the JSON as bytes.
        timeout_s: Triton's `timeout` parameter, or None.
    """

    items: list[dict[str, Any]]
    id: str | None
    outputs: Sequence[tuple[TensorSpec, bool]]
    timeout_s: float | None


def near(name: object, known: Sequence[str]) -> str:
    """Return `; did you mean ...?` where a known name looks like this one, else the known names."""
    found = get_close_matches((name if type(name) is str else "")[:LONGEST_NEAR].lower(), known, n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else f"; known are {', '.join(sorted(known)) or 'none'}"


class OpenInference:
    """Reads requests to one model and writes its answers."""

    def __init__(self, spec: ModelSpec, signature: Signature) -> None:
        self.spec = spec
        self.signature = signature
        self.version = version_of(spec.revision)
        self._inputs = {tensor.name: tensor for tensor in signature.inputs}
        self._required = [tensor.name for tensor in signature.inputs if not tensor.optional]
        self._outputs = {tensor.name: tensor for tensor in signature.outputs}
        self._all_json = [(tensor, False) for tensor in signature.outputs]
        self._all_binary = [(tensor, True) for tensor in signature.outputs]

    def read(self, body: bytes, header_length: bytes | None) -> InferRequest:
        """Parse the body of `infer`.

        Args:
            header_length: The value of Inference-Header-Content-Length: bytes of JSON before the tensors' bytes.

        Raises:
            InvalidInput: The request is wrong; the place says where.
            UnsupportedParameter: It has a parameter that the model does not list.
            PayloadTooLarge: It has more items than the model takes.
        """
        if header_length is None:
            return self._read_document(body, memoryview(b""))
        length = read_length(header_length)
        if length is None or length > len(body):
            raise InvalidInput(
                f"{header_length.decode('latin-1')!r:.40} is not a number of bytes from 0 to the body's {len(body)}",
                place="header inference-header-content-length",
            )
        view = memoryview(body)
        return self._read_document(view[:length], view[length:]) if length else self._read_raw(view)

    def _read_raw(self, body: memoryview) -> InferRequest:
        if len(self._inputs) != 1 and len(self._required) != 1:
            raise InvalidInput(f"the model has {len(self._inputs)} inputs; send a JSON header", place="body")
        name = self._required[0] if len(self._required) == 1 else next(iter(self._inputs))
        rows = tensors.read_raw(body, self._inputs[name])
        self._check_count(len(rows), "body")
        return InferRequest([{name: row} for row in rows], None, self._all_binary, None)

    def _read_document(self, raw: bytes | memoryview, binary: memoryview) -> InferRequest:
        document = parse_object(raw)
        if not document.keys() <= _REQUEST_KEYS:
            unknown = next(key for key in document if key not in _REQUEST_KEYS)
            raise InvalidInput(f"is not a key of a request{near(unknown, list(_REQUEST_KEYS))}", place=unknown[:80])
        request_id = document.get("id")
        if request_id is not None and type(request_id) is not str:
            raise InvalidInput(f"must be a string, not {json_type(request_id)}", place="id")
        if "model_name" in document or "model_version" in document:
            self._check_addressee(document)
        sent = document.get("parameters")
        parameters, binary_output, timeout_s = ({}, False, None) if sent is None else self._read_parameters(sent)
        items = self._read_inputs(document.get("inputs"), binary)
        if parameters:
            for item in items:
                item["parameters"] = parameters
        return InferRequest(items, request_id, self._read_outputs(document.get("outputs"), binary_output), timeout_s)

    def _check_addressee(self, document: dict[str, Any]) -> None:
        for key, own in (("model_name", self.spec.name), ("model_version", self.version)):
            if document.get(key) not in (None, "", own):
                raise InvalidInput(f"is {quoted(document[key])}, and this is {own!r}", place=key)

    def _read_parameters(self, sent: object) -> tuple[dict[str, Any], bool, float | None]:
        if type(sent) is not dict:
            raise InvalidInput(f"must be an object, not {json_type(sent)}", place="parameters")
        own: dict[str, Any] = {}
        binary_output, timeout_s = False, None
        for key, value in sent.items():
            place = f"parameters.{key[:80]}"
            if key == "binary_data_output":
                binary_output = _boolean(value, place)
            elif key in self.signature.parameters:
                own[key] = _parameter(value, place)
            elif key == "timeout":
                timeout_s = _microseconds(value, place)
            elif key not in _UNUSED:
                hint = near(key, [*self.signature.parameters, "binary_data_output", "timeout"])
                raise UnsupportedParameter(f"model {self.spec.name!r} has no such parameter{hint}", place=place)
            elif not any(value is no or (type(value) is type(no) and value == no) for no in _UNUSED[key]):
                raise UnsupportedParameter("is not supported: requests have no sequence and no priority", place=place)
        return own, binary_output, timeout_s

    def _read_inputs(self, inputs: object, binary: memoryview) -> list[dict[str, Any]]:
        if type(inputs) is not list or not inputs:
            what = "is empty" if type(inputs) is list else f"must be a list, not {json_type(inputs)}"
            raise InvalidInput(f"{what}; the model takes {', '.join(self._inputs)}", place="inputs")
        columns: dict[str, tensors.Rows] = {}
        offset = 0
        for index, tensor in enumerate(inputs):
            place = f"inputs[{index}]"
            spec = self._check_input(tensor, place)
            if spec.name in columns:
                raise InvalidInput(f"{spec.name!r} stands twice", place=f"{place}.name")
            shape = tensors.read_shape(tensor["shape"], spec, place)
            if index == 0:
                self._check_count(shape[0], f"{place}.shape[0]")
            sent = tensor.get("parameters")
            size = None if sent is None else _binary_size(sent, place, len(binary) - offset)
            if size is None:
                if "data" not in tensor:
                    raise InvalidInput(
                        "is missing (neither data nor parameters.binary_data_size)", place=f"{place}.data"
                    )
                columns[spec.name] = tensors.read_json(tensor["data"], shape, spec, place)
            elif "data" in tensor:
                raise InvalidInput("stands beside parameters.binary_data_size; send one of them", place=f"{place}.data")
            else:
                columns[spec.name] = tensors.read_binary(binary[offset : offset + size], shape, spec, place)
                offset += size
        if offset != len(binary):
            raise InvalidInput(f"{len(binary) - offset} bytes follow the last tensor", place="body")
        return self._rows(columns)

    def _check_input(self, tensor: object, place: str) -> TensorSpec:
        if type(tensor) is not dict:
            raise InvalidInput(f"must be an object, not {json_type(tensor)}", place=place)
        if not tensor.keys() <= _INPUT_KEYS:
            unknown = next(key for key in tensor if key not in _INPUT_KEYS)
            raise InvalidInput(
                f"is not a key of a tensor{near(unknown, list(_INPUT_KEYS))}", place=f"{place}.{unknown[:80]}"
            )
        if not tensor.keys() >= _NEEDED_KEYS:
            missing = next(key for key in ("name", "shape", "datatype") if key not in tensor)
            raise InvalidInput("is missing", place=f"{place}.{missing}")
        name = tensor["name"]
        spec = self._inputs.get(name) if type(name) is str else None
        if spec is None:
            raise InvalidInput(
                f"{quoted(name)} is no input of the model{near(name, list(self._inputs))}", place=f"{place}.name"
            )
        if tensor["datatype"] != spec.datatype:
            raise InvalidInput(
                f"is {quoted(tensor['datatype'])}, and {name!r} takes {spec.datatype}", place=f"{place}.datatype"
            )
        return spec

    def _check_count(self, count: int, place: str) -> None:
        if count > self.spec.limits.max_items:
            raise PayloadTooLarge(f"{count} items, and a request may have {self.spec.limits.max_items}", place=place)

    def _rows(self, columns: dict[str, tensors.Rows]) -> list[dict[str, Any]]:
        for name in self._required:
            if name not in columns:
                raise InvalidInput(f"the input {name!r} is missing", place="inputs")
        if len(columns) == 1:
            ((name, rows),) = columns.items()
            return [{name: row} for row in rows]
        counts = {name: len(rows) for name, rows in columns.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise InvalidInput(f"the inputs differ in their number of items: {told}", place="inputs")
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _read_outputs(self, outputs: object, binary_output: bool) -> Sequence[tuple[TensorSpec, bool]]:
        if outputs is None or outputs == []:
            return self._all_binary if binary_output else self._all_json
        if type(outputs) is not list:
            raise InvalidInput(f"must be a list, not {json_type(outputs)}", place="outputs")
        chosen: dict[str, tuple[TensorSpec, bool]] = {}
        for index, output in enumerate(outputs):
            place = f"outputs[{index}]"
            if type(output) is not dict:
                raise InvalidInput(f"must be an object, not {json_type(output)}", place=place)
            for key in output:
                if key not in _OUTPUT_KEYS:
                    raise InvalidInput(
                        f"is not a key of an output{near(key, list(_OUTPUT_KEYS))}", place=f"{place}.{key[:80]}"
                    )
            name = output.get("name")
            spec = self._outputs.get(name) if type(name) is str else None
            if spec is None:
                raise InvalidInput(
                    f"{quoted(name)} is no output of the model{near(name, list(self._outputs))}", place=f"{place}.name"
                )
            if spec.name in chosen:
                raise InvalidInput(f"{spec.name!r} stands twice", place=f"{place}.name")
            chosen[spec.name] = (spec, _output_binary(output.get("parameters"), place, binary_output))
        return list(chosen.values())

    def write(self, request: InferRequest, results: Sequence[Mapping[str, Any]]) -> tuple[Headers, bytes]:
        """Return the headers and the body that answer a request.

        Args:
            results: One a row, as `Model.predict` gives them.

        Raises:
            PredictionFailed: The model left out an output, or its rows do not make a tensor.
        """
        document: dict[str, Any] = {"model_name": self.spec.name, "model_version": self.version}
        if request.id is not None:
            document["id"] = request.id
        outputs: list[dict[str, Any]] = []
        parts: list[bytes] = []
        for spec, binary in request.outputs:
            try:
                tensor = tensors.stack([result[spec.name] for result in results], spec)
            except KeyError as error:
                raise PredictionFailed(f"the model gave no output {spec.name!r}") from error
            if binary:
                output, raw = tensors.write_binary(tensor, spec)
                parts.append(raw)
            else:
                output = tensors.write_json(tensor, spec)
            outputs.append(output)
        document["outputs"] = outputs
        head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
        if not parts:
            return [JSON_HEADER], head
        length = (HEADER_LENGTH, b"%d" % len(head))
        return [(b"content-type", b"application/octet-stream"), length], b"".join((head, *parts))

    def check_version(self, version: str) -> None:
        """Refuse every version but the one that is served.

        Raises:
            InvalidInput: It is another one.
        """
        if version != self.version:
            raise InvalidInput(
                f"is {version!r:.60}, and {self.spec.name!r} has the version {self.version!r}", place="version"
            )

    def metadata(self) -> dict[str, Any]:
        """Return the model metadata (Open Inference Protocol v2, "Model Metadata")."""
        return {
            "name": self.spec.name,
            "versions": [self.version],
            "platform": f"roundhouse_{self.spec.task.replace('-', '_')}",
            "inputs": [_tensor_metadata(tensor) for tensor in self.signature.inputs],
            "outputs": [_tensor_metadata(tensor) for tensor in self.signature.outputs],
        }

    def config(self) -> dict[str, Any]:
        """Return the model's configuration in Triton's words (model configuration extension)."""
        batching = self.spec.batching
        return {
            "name": self.spec.name,
            "platform": f"roundhouse_{self.spec.task.replace('-', '_')}",
            "backend": "roundhouse",
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": batching.max_batch_size,
            "input": [_tensor_config(t) | {"optional": t.optional} for t in self.signature.inputs],
            "output": [_tensor_config(t) for t in self.signature.outputs],
            "dynamic_batching": {
                "max_queue_delay_microseconds": int(batching.max_wait_ms * 1000),
                "default_queue_policy": {"max_queue_size": batching.max_queue},
            },
        }


def _tensor_metadata(tensor: TensorSpec) -> dict[str, Any]:
    told: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    # Clients that do not know the model learn here which strings are encoded bytes, and what may be left out.
    parameters: dict[str, Any] = {"content": tensor.content} if tensor.content != "text" else {}
    if tensor.optional:
        parameters["optional"] = True
    return told | {"parameters": parameters} if parameters else told


def _tensor_config(tensor: TensorSpec) -> dict[str, Any]:
    kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    return {"name": tensor.name, "data_type": f"TYPE_{kind}", "dims": list(tensor.shape[1:])}


def _boolean(value: object, place: str) -> bool:
    if type(value) is not bool:
        raise InvalidInput(f"must be true or false, not {quoted(value)}", place=place)
    return value


def _parameter(value: object, place: str) -> object:
    if type(value) in (str, int, float, bool) or (type(value) is list and all(type(part) is str for part in value)):
        return value
    raise InvalidInput(
        f"must be a string, a number, a boolean or a list of strings, not {json_type(value)}", place=place
    )


def _microseconds(value: object, place: str) -> float | None:
    if type(value) is not int or not 0 <= value < 2**53:
        raise InvalidInput(f"must be a whole number of microseconds from 0, not {quoted(value)}", place=place)
    return value / 1e6 if value else None


def _binary_size(parameters: object, place: str, left: int) -> int | None:
    if type(parameters) is not dict:
        raise InvalidInput(f"must be an object, not {json_type(parameters)}", place=f"{place}.parameters")
    for key in parameters:
        if key != "binary_data_size":
            reason = (
                "shared memory is not supported" if key.startswith("shared_memory") else "is no parameter of a tensor"
            )
            raise UnsupportedParameter(reason, place=f"{place}.parameters.{key[:80]}")
    size = parameters.get("binary_data_size")
    if size is None:
        return None
    if type(size) is not int or not 0 <= size <= left:
        raise InvalidInput(
            f"is {quoted(size)}, and {left} bytes are left after the JSON", place=f"{place}.parameters.binary_data_size"
        )
    return size


def _output_binary(parameters: object, place: str, otherwise: bool) -> bool:
    if parameters is None:
        return otherwise
    if type(parameters) is not dict:
        raise InvalidInput(f"must be an object, not {json_type(parameters)}", place=f"{place}.parameters")
    for key, value in parameters.items():
        if key == "binary_data" or (key == "classification" and type(value) is int and value == 0):
            continue
        raise UnsupportedParameter("is no parameter of an output here", place=f"{place}.parameters.{key[:80]}")
    return _boolean(parameters.get("binary_data", otherwise), f"{place}.parameters.binary_data")
