"""OpenAPI documents made from what a model says of itself, so that their examples are requests which it answers."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from serve.api import tensors
from serve.api.directory import ModelStatus
from serve.api.explanation import example
from serve.api.open_inference import OpenInference
from serve.api.openai_surface import ENDPOINTS
from serve.models.base import Item, Signature, TensorSpec
from serve.spec import ModelSpec

Document = dict[str, Any]

_ERRORS = {
    "400": "The request is wrong; the message names the place.",
    "404": "No such model or path; near names follow.",
    "413": "The body, or the number of items, is over its limit.",
    "415": "The content type or encoding is not understood.",
    "429": "The queue is full; Retry-After says for how many seconds.",
    "500": "The model failed on this input.",
    "503": "The model is loading, draining or failed; Retry-After says when to ask again.",
    "504": "The deadline passed before the answer.",
}
_SUMMARIES = {
    "embeddings": "Texts to vectors",
    "chat/completions": "The next message of a chat",
    "completions": "The continuation of a text",
    "audio/transcriptions": "A recording to words",
}
_TENSOR_SCHEMA: Document = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "datatype": {"type": "string"},
        "parameters": {"type": "object"},
        "data": {"type": "array", "description": "Nested or flat, row-major.", "items": {}},
    },
}


def model_document(protocol: OpenInference) -> Document:
    """Return the OpenAPI 3.1 document of one model."""
    spec, signature = protocol.spec, protocol.signature
    paths: Document = {
        "/infer": {"post": _infer_operation(spec, signature)},
        "/": {"get": _read_operation("The model's tensors", protocol.metadata())},
        "/ready": {"get": _read_operation("Whether the model answers", {"name": spec.name, "ready": True})},
        "/config": {"get": _read_operation("The model's configuration, in Triton's words", protocol.config())},
        "/stats": {"get": _read_operation("What the model has done", {"model_stats": []})},
        "/explain": {"get": _explain_operation(spec.name)},
    }
    for endpoint, task in ENDPOINTS.items():
        if task == spec.task:
            paths[f"/v1/{endpoint}"] = {"post": _openai_operation(endpoint, spec.name)}
    return {
        "openapi": "3.1.0",
        "info": {"title": spec.name, "version": protocol.version, "description": _about(spec, signature)},
        "servers": [{"url": f"/v2/models/{spec.name}"}],
        "paths": paths,
    }


def _about(spec: ModelSpec, signature: Signature) -> str:
    lines = [spec.description or f"A model for {spec.task}.", ""]
    for title, described in (("Inputs", signature.inputs), ("Outputs", signature.outputs)):
        lines += [f"{title}:", *(f"- {_describe(tensor)}" for tensor in described), ""]
    if signature.parameters:
        lines += ["Parameters:", *(f"- `{name}`: {meaning}" for name, meaning in signature.parameters.items()), ""]
    return "\n".join(lines).strip()


def _describe(tensor: TensorSpec) -> str:
    optional = ", optional" if tensor.optional else ""
    content = ", base64 in JSON" if tensor.content == "base64" else ""
    return f"`{tensor.name}` {tensor.datatype} {list(tensor.shape)}{optional}{content}: {tensor.description}"


def infer_example(signature: Signature) -> Document | None:
    """Return a body of `infer` made from the signature's example, or None where it has none of tensors."""
    example: Item | None = signature.example
    if example is None or not any(tensor.name in example for tensor in signature.inputs):
        return None
    return {
        "inputs": [tensors.example_tensor(example, tensor) for tensor in signature.inputs if tensor.name in example]
    }


def _infer_operation(spec: ModelSpec, signature: Signature) -> Document:
    parameters = {name: {"description": meaning} for name, meaning in signature.parameters.items()}
    schema: Document = {
        "type": "object",
        "required": ["inputs"],
        "additionalProperties": False,
        "properties": {
            "id": {"type": "string", "description": "Repeated in the answer."},
            "model_name": {"type": "string", "const": spec.name},
            "model_version": {"type": "string"},
            "parameters": {"type": "object", "properties": parameters},
            "inputs": {"type": "array", "minItems": 1, "items": _TENSOR_SCHEMA},
            "outputs": {"type": "array", "items": {"type": "object", "required": ["name"]}},
        },
    }
    content: Document = {"schema": schema}
    example = infer_example(signature)
    if example is not None:
        content["example"] = example
    description = (
        "Open Inference Protocol v2. Tensors may follow the JSON as bytes (binary tensor data extension), "
        "and the body may be gzip or deflate."
    )
    return {
        "summary": "Tensors in, tensors out",
        "description": description,
        "operationId": "infer",
        "parameters": [_DEADLINE],
        "requestBody": {"required": True, "content": {"application/json": content}},
        "responses": {"200": _answered({"type": "object"}), **_errors({"error": "..."})},
    }


_DEADLINE: Document = {
    "name": "x-request-timeout-ms",
    "in": "header",
    "required": False,
    "description": "Milliseconds after which the answer is of no use.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}


def openai_example(endpoint: str, model: str) -> Document:
    """Return a body that a model of the endpoint's task answers."""
    if endpoint == "embeddings":
        return {"model": model, "input": ["The locomotive turns on the table.", "A cat sleeps."]}
    if endpoint == "chat/completions":
        return {"model": model, "messages": [{"role": "user", "content": "What is a roundhouse?"}], "max_tokens": 60}
    if endpoint == "completions":
        return {"model": model, "prompt": "A roundhouse is", "max_tokens": 30}
    return {"model": model, "file": "speech.wav", "response_format": "json"}


def _openai_operation(endpoint: str, model: str) -> Document:
    example = openai_example(endpoint, model)
    kind = "application/json"
    properties: Document = {name: {} for name in example}
    if endpoint == "audio/transcriptions":
        kind = "multipart/form-data"
        properties["file"] = {"type": "string", "contentMediaType": "application/octet-stream"}
    schema = {
        "type": "object",
        "required": [k for k in example if k in ("model", "input", "messages", "prompt", "file")],
    }
    error = {"error": {"message": "...", "type": "invalid_request_error", "param": "input", "code": "invalid_value"}}
    return {
        "summary": _SUMMARIES[endpoint],
        "description": f"As OpenAI's clients ask it, with base_url `/v2/models/{model}/v1` or, at the gateway, `/v1`.",
        "operationId": endpoint.replace("/", "_"),
        "parameters": [_DEADLINE],
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": {**schema, "properties": properties}, "example": example}},
        },
        "responses": {"200": _answered({"type": "object"}), **_errors(error)},
    }


def _explain_operation(model: str) -> Document:
    return _read_operation("Why there are as many replicas as there are", example(model)) | {
        "description": "`holds` says why their number stays as it is; `decisions` are its last changes, newest first, "
        "each with the load that it was decided on."
    }


_MODEL: Document = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


def _read_operation(summary: str, example: Mapping[str, Any] | list[Document]) -> Document:
    schema = {"type": "array", "items": {"type": "object"}} if isinstance(example, list) else {"type": "object"}
    content = {"application/json": {"schema": schema, "example": example}}
    return {"summary": summary, "responses": {"200": {"description": "As the example.", "content": content}}}


def _answered(schema: Document) -> Document:
    return {"description": "The answer.", "content": {"application/json": {"schema": schema}}}


def _errors(example: Document) -> Document:
    content = {"application/json": {"schema": {"type": "object"}, "example": example}}
    return {status: {"description": meaning, "content": content} for status, meaning in _ERRORS.items()}


def gateway_document(models: Sequence[ModelStatus]) -> Document:
    """Return the OpenAPI 3.1 document of the gateway."""
    index = [{"name": status.name, "version": status.version, "state": "READY", "reason": ""} for status in models]
    paths: Document = {
        "/v2": {"get": _read_operation("The server", {"name": "roundhouse", "version": "...", "extensions": []})},
        "/v2/health/live": {"get": _read_operation("Whether the server runs", {"live": True, "ready": True})},
        "/v2/health/ready": {"get": _read_operation("Whether every model answers", {"live": True, "ready": True})},
        "/v2/repository/index": {"post": _read_operation("Every declared model and its state", index)},
        "/v2/models/{name}/explain": {"get": _explain_operation("minilm") | {"parameters": [_MODEL]}},
        "/v1/models": {"get": _read_operation("Every declared model", {"object": "list", "data": []})},
    }
    for endpoint, task in ENDPOINTS.items():
        names = [status.name for status in models if status.task == task]
        if names:
            operation = _openai_operation(endpoint, names[0])
            operation["description"] = f"`model` names one of: {', '.join(names)}."
            paths[f"/v1/{endpoint}"] = {"post": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Roundhouse", "version": "2", "description": "Every declared model behind one address."},
        "servers": [{"url": "/"}],
        "paths": paths,
    }


_FILES = {"image-classification": ("image", "picture.jpg"), "voice-activity": ("audio", "speech.wav")}


def curl(name: str, task: str, base_url: str, *, request: str | None = None) -> str:
    """Return a command that the model answers, made from its task alone, so that it is known before the model is.

    Args:
        request: A JSON body of `infer` to send instead, where one is known.
    """
    url = f"{base_url}/v2/models/{name}"
    endpoint = next((endpoint for endpoint, of in ENDPOINTS.items() if of == task), None)
    if endpoint == "audio/transcriptions":
        return f"curl {base_url}/v1/{endpoint} -F model={name} -F file=@speech.wav"
    if endpoint is not None:
        return f"curl {base_url}/v1/{endpoint} -d {shlex.quote(json.dumps(openai_example(endpoint, name)))}"
    if task in _FILES:
        tensor, file = _FILES[task]
        before, after = json.dumps(_one_tensor(tensor, "BYTES", [1], ["|"])).split("|")
        return (
            f"(printf '{before}'; base64 < {file} | tr -d '\\n'; printf '{after}') | curl {url}/infer --data-binary @-"
        )
    if task == "forecast":
        request = json.dumps(_one_tensor("series", "FP32", [1, 8], [1, 2, 3, 2, 1, 2, 3, 2]))
    return f"curl {url}/infer -d {shlex.quote(request)}" if request else f"curl {url}"


def _one_tensor(name: str, datatype: str, shape: list[int], data: list[Any]) -> Document:
    return {"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": data}]}


def shortened(value: Any) -> Any:
    """Return a copy of an example whose long strings and lists are cut, for people to read."""
    if isinstance(value, str):
        return value if len(value) <= 120 else f"{value[:96]}… ({len(value)} characters)"
    if isinstance(value, bytes):
        return shortened(base64.b64encode(value).decode())
    if isinstance(value, Mapping):
        return {key: shortened(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        cut = [shortened(inner) for inner in value[:16]]
        return cut if len(value) <= 16 else [*cut, f"… {len(value)} in all"]
    return value
