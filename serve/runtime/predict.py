"""`roundhouse predict`: ask a running platform over HTTP, as any client would."""

from __future__ import annotations

import base64
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from serve.errors import InvalidInput, RoundhouseError

# The platform is on this machine: a proxy of the environment does not lead there.
_HOW: dict[str, Any] = {"timeout": 300.0, "trust_env": False}
_GENERATION = "roundhouse_text_generation"


class RequestFailed(RoundhouseError):
    """The platform answered with an error, or not at all; the message is its own sentence."""


def answer(base_url: str, model: str, inputs: Sequence[str], *, as_json: bool, max_tokens: int) -> int:
    """Ask a model and print what it says; return the exit status.

    Raises:
        InvalidInput: An input cannot be what the model takes.
        RequestFailed: The platform refused or is not there.
    """
    metadata = get(f"{base_url}/v2/models/{model}")
    if not isinstance(metadata, dict) or not metadata.keys() >= {"platform", "inputs"}:
        raise RequestFailed(f"{model!r} is no model; `roundhouse status` lists them")
    if not as_json and metadata["platform"] == _GENERATION:
        print_stream(chat(base_url, model, " ".join(inputs), max_tokens=max_tokens))
        return 0
    answered = predict(f"{base_url}/v2/models/{model}", metadata, inputs)
    sys.stdout.write((json.dumps(answered, indent=2) if as_json else readable(answered)) + "\n")
    return 0


def readable(answered: dict[str, Any]) -> str:
    """Return an answer as lines for people: a block a row, long tensors cut short (pure)."""
    outputs = answered["outputs"]
    lines = []
    for row in range(outputs[0]["shape"][0]):
        for tensor in outputs:
            size = len(tensor["data"]) // tensor["shape"][0]
            lines.append(f"{tensor['name']:<18} {_short(tensor['data'][row * size : (row + 1) * size])}")
        lines.append("")
    return "\n".join(lines[:-1])


def _short(values: Sequence[Any]) -> str:
    shown = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values[:8]]
    more = f", ... ({len(values)} values)" if len(values) > 8 else ""
    return ", ".join(shown) + more


def get(url: str) -> Any:
    """Return the parsed JSON behind a URL.

    Raises:
        RequestFailed: No answer, or an error.
    """
    return parsed(send("GET", url))


def predict(url: str, metadata: dict[str, Any], inputs: Sequence[str]) -> dict[str, Any]:
    """Send inputs as one Open Inference request and return its answer.

    Args:
        url: The model's.
        metadata: The model's, as the protocol has it.
        inputs: One row each: text, `@file` for a picture, a sound or a text file, or a JSON list of numbers.

    Raises:
        InvalidInput: An input cannot be what the model takes.
        RequestFailed: The platform refused or is not there.
    """
    tensors = [tensor for tensor in metadata["inputs"] if not tensor.get("parameters", {}).get("optional")]
    if len(tensors) != 1:
        names = ", ".join(tensor["name"] for tensor in tensors)
        raise InvalidInput(f"{metadata['name']} takes several tensors ({names}); send them with curl, see {url}/docs")
    body = _encoded({"inputs": [input_tensor(tensors[0], inputs)]})
    return dict(parsed(send("POST", f"{url}/infer", content=body)))


def _encoded(body: dict[str, Any]) -> bytes:
    """Return a body in JSON; what is no Unicode becomes escapes, which the platform refuses by their place."""
    try:
        return json.dumps(body, allow_nan=False).encode()
    except ValueError as error:
        raise InvalidInput("a number is not finite, which JSON cannot hold") from error


def input_tensor(tensor: dict[str, Any], inputs: Sequence[str]) -> dict[str, Any]:
    """Return the request's tensor for a model's metadata entry and the words of a command line."""
    rows = [_row(tensor, text, index) for index, text in enumerate(inputs)]
    shape = [len(rows)]
    row: Any = rows[0]
    while isinstance(row, list):
        shape.append(len(row))
        row = row[0] if row else None
    return {"name": tensor["name"], "datatype": tensor["datatype"], "shape": shape, "data": rows}


def _row(tensor: dict[str, Any], text: str, index: int) -> Any:
    place = f"input {index + 1}"
    if tensor["datatype"] == "BYTES":
        encoded = tensor.get("parameters", {}).get("content") == "base64"
        if text.startswith("@"):
            content = _read(text[1:], place)
            return base64.b64encode(content).decode() if encoded else _text(content, place)
        if encoded:
            raise InvalidInput(f"{tensor['name']!r} wants a file: @{text}", place=place)
        return text
    source = _text(_read(text[1:], place), place) if text.startswith("@") else text
    try:
        return json.loads(source if source.lstrip().startswith("[") else f"[{source}]")
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"{tensor['name']!r} wants numbers such as 1,2,3 or [1, 2, 3] and got {source[:60]!r}", place=place
        ) from error


def _text(content: bytes, place: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"is not UTF-8 text: {error}", place=place) from error


def _read(path: str, place: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror}", place=place) from error


def chat(base_url: str, model: str, prompt: str, *, max_tokens: int) -> Iterator[str]:
    """Yield a chat answer as it is generated.

    Raises:
        RequestFailed: The platform refused or is not there.
    """
    body = {
        "model": model,
        "stream": True,
        "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": prompt}],
    }
    url = f"{base_url}/v2/models/{model}/v1/chat/completions"
    with _failures(url), httpx.stream("POST", url, content=_encoded(body), **_HOW) as response:
        if response.status_code != 200:
            response.read()
            parsed(response)
        for line in response.iter_lines():
            if line == "data: [DONE]":
                return
            if line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RequestFailed(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
    raise RequestFailed(f"{url}: the answer ended before it was whole")


def print_stream(parts: Iterator[str]) -> None:
    """Print parts as they come, and a line end."""
    for part in parts:
        sys.stdout.write(part)
        sys.stdout.flush()
    sys.stdout.write("\n")


@contextlib.contextmanager
def _failures(url: str) -> Iterator[None]:
    """Turn transport errors into a sentence."""
    try:
        yield
    except httpx.ConnectError as error:
        raise RequestFailed(f"nothing answers at {url}; is `roundhouse up` running?") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RequestFailed(f"{url!r}: {error or type(error).__name__}") from error


def send(method: str, url: str, **arguments: Any) -> httpx.Response:
    """Send a request to the platform.

    Raises:
        RequestFailed: Nothing answers.
    """
    with _failures(url):
        return httpx.request(method, url, **_HOW, **arguments)


def parsed(response: httpx.Response) -> Any:
    """Return the JSON of an answer.

    Raises:
        RequestFailed: It is an error, or no JSON.
    """
    try:
        told = response.json()
        if response.status_code == 200:
            return told
        said = told["error"]
        message = said["message"] if isinstance(said, dict) else said
    except (ValueError, KeyError, TypeError):
        message = response.text[:500] or response.reason_phrase
    raise RequestFailed(f"{response.status_code}: {message}")
