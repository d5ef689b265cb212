"""OpenAI's HTTP surface: what its requests say, strictly read, and what its answers look like."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from serve.api.body import json_type, quoted
from serve.api.multipart import Part
from serve.api.open_inference import near
from serve.errors import InvalidInput, ModelNotFound, PayloadTooLarge, UnsupportedMedia, UnsupportedParameter
from serve.models.base import Signature
from serve.spec import ModelSpec

MAX_CHOICES = 16
_MAX_STOPS = 4

#: Endpoint -> the task whose models answer it.
ENDPOINTS = {
    "embeddings": "text-embedding",
    "chat/completions": "text-generation",
    "completions": "text-generation",
    "audio/transcriptions": "speech-to-text",
}

# Parameters that OpenAI knows and that are not supported here, with the values under which they change nothing.
# `...` stands for any value: it says who asks, not what is asked.
_IDLE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include": ([],),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": (...,),
    "prompt_cache_retention": (...,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (...,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "user": (...,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_ROW = re.compile(r"^inputs row (\d+)(?:, (.*))?$")


class Fields:
    """The keys of a request, taken one after the other; null is the same as absent; what is left over is refused."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._left = {key: value for key, value in document.items() if value is not None}

    def take(self, name: str) -> Any:
        """Return a value of any type, or None."""
        return self._left.pop(name, None)

    def string(self, name: str) -> str | None:
        """Return a string, or None."""
        value = self._left.pop(name, None)
        if value is not None and type(value) is not str:
            raise InvalidInput(f"must be a string, not {json_type(value)}", place=name)
        return value

    def boolean(self, name: str) -> bool:
        """Return a boolean; absent is false."""
        value = self._left.pop(name, False)
        if type(value) is not bool:
            raise InvalidInput(f"must be true or false, not {quoted(value)}", place=name)
        return value

    def integer(self, name: str, *, low: int, high: int) -> int | None:
        """Return a whole number between two bounds, or None."""
        value = self._left.pop(name, None)
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise InvalidInput(f"must be a whole number from {low} to {high}, not {quoted(value)}", place=name)
        return value

    def number(self, name: str, *, low: float, high: float) -> float | None:
        """Return a number between two bounds, or None."""
        value = self._left.pop(name, None)
        if value is not None and (type(value) not in (int, float) or not low <= value <= high):
            raise InvalidInput(f"must be a number from {low:g} to {high:g}, not {quoted(value)}", place=name)
        return None if value is None else float(value)

    def rest(self, signature: Signature, known: Iterable[str]) -> dict[str, Any]:
        """Return the parameters of the model's own that are left.

        Raises:
            UnsupportedParameter: OpenAI knows the parameter, and its value here would change something.
            InvalidInput: Nobody knows it.
        """
        own: dict[str, Any] = {}
        for key, value in self._left.items():
            if key in _IDLE:
                if not any(idle is ... or _same(value, idle) for idle in _IDLE[key]):
                    raise UnsupportedParameter(f"is not supported here (it was {quoted(value)})", place=key)
            elif key in signature.parameters:
                own[key] = value
            else:
                hint = near(key, [*known, *signature.parameters])
                raise UnsupportedParameter(f"is no parameter of this request{hint}", place=key[:80])
        return own


def _same(value: object, idle: object) -> bool:
    return value == idle and (type(value) is bool) == (type(idle) is bool)


def check_model(fields: Fields, spec: ModelSpec) -> None:
    """Refuse a request to another model.

    Raises:
        InvalidInput: It names no model.
        ModelNotFound: It names another one than this.
    """
    name = fields.string("model")
    if name is None:
        raise InvalidInput(f"is missing; this is {spec.name!r}", place="model")
    if name != spec.name:
        raise ModelNotFound(name, near=[spec.name])


def check_task(endpoint: str, spec: ModelSpec) -> None:
    """Refuse an endpoint that models of this task do not answer.

    Raises:
        InvalidInput: The model has another task; the message says which, and what answers it.
    """
    if ENDPOINTS[endpoint] != spec.task:
        own = [f"/v1/{path}" for path, task in ENDPOINTS.items() if task == spec.task]
        instead = " and ".join(own) or f"/v2/models/{spec.name}/infer"
        raise InvalidInput(
            f"{spec.name!r} does {spec.task}, and /v1/{endpoint} is for {ENDPOINTS[endpoint]}; ask it at {instead}",
            place="model",
        )


def of_request(error: InvalidInput, field: str, *, choices: int = 1) -> InvalidInput:
    """Return an error about an item as one about the request's field that the item came from.

    Args:
        choices: Items that each element of the field became. The messages of a chat are one prompt, of any items.
    """
    place = error.place
    row = _ROW.match(place) if place else None
    if row:
        element = field if field == "messages" else f"{field}[{int(row[1]) // choices}]"
        place = element if row[2] in (None, "text", "prompt") else row[2]
    if place is None or place in ("text", "prompt", "audio"):
        place = field
    return type(error)(error.message, place=place.removeprefix("parameters."))


# Embeddings


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    """A parsed `POST /v1/embeddings`.

    Args:
        as_base64: Vectors as base64 of little-endian float32, else as lists of numbers.
        dimensions: What the caller expects of a vector, or None.
    """

    texts: list[str]
    as_base64: bool
    dimensions: int | None


def read_embeddings(document: Mapping[str, Any], spec: ModelSpec, signature: Signature) -> EmbeddingsRequest:
    """Read a request for embeddings.

    Raises:
        InvalidInput, UnsupportedParameter, PayloadTooLarge, ModelNotFound: As the message says.
    """
    fields = Fields(document)
    check_model(fields, spec)
    texts = _texts(fields.take("input"), "input", most=spec.limits.max_items)
    encoding = fields.string("encoding_format")
    if encoding not in (None, "float", "base64"):
        raise InvalidInput(f"must be 'float' or 'base64', not {quoted(encoding)}", place="encoding_format")
    dimensions = fields.integer("dimensions", low=1, high=2**31)
    own = next((tensor.shape[-1] for tensor in signature.outputs if tensor.name == "embedding"), -1)
    if dimensions is not None and own != dimensions:
        raise UnsupportedParameter(
            f"model {spec.name!r} gives {own} dimensions and cannot give {dimensions}; leave it out", place="dimensions"
        )
    fields.rest(Signature((), ()), ("model", "input", "encoding_format", "dimensions", "user"))
    return EmbeddingsRequest(texts, encoding == "base64", dimensions)


def _texts(value: object, place: str, *, most: int) -> list[str]:
    """Return one text or several; token ids, which OpenAI also takes, are of its own vocabulary and are refused."""
    if type(value) is list and len(value) > most:
        raise PayloadTooLarge(f"{len(value)} texts, and a request may have {most}", place=place)
    if type(value) is str:
        value = [value]
        places = [place]
    elif type(value) is list:
        places = [f"{place}[{index}]" for index in range(len(value))] if not all(value) else []
    else:
        what = "is missing" if value is None else f"must be a string or a list of strings, not {json_type(value)}"
        raise InvalidInput(what, place=place)
    if not value:
        raise InvalidInput("is an empty list", place=place)
    for index, text in enumerate(value):
        if type(text) in (int, list):
            raise InvalidInput("token ids are not supported; send text", place=f"{place}[{index}]")
        if type(text) is not str:
            raise InvalidInput(f"must be a string, not {json_type(text)}", place=f"{place}[{index}]")
        if not text:
            raise InvalidInput("is an empty string", place=places[index])
    return value


def embeddings_answer(
    request: EmbeddingsRequest, results: Sequence[Mapping[str, Any]], *, model: str
) -> dict[str, Any]:
    """Return the answer; its vectors may still be float32 arrays, for the JSON writer to read as they lie."""
    data = []
    tokens = 0
    for index, result in enumerate(results):
        vector: Any = np.asarray(result["embedding"], dtype="<f4")
        tokens += int(result["token_count"])
        if request.as_base64:
            vector = base64.b64encode(vector.tobytes()).decode("ascii")
        data.append({"object": "embedding", "index": index, "embedding": vector})
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


# Text


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A parsed `POST /v1/chat/completions` or `/v1/completions`.

    Args:
        items: One a choice: every prompt `choices` times, with seeds that follow each other.
        choices: Choices of each prompt (`n`).
        field: The request's field that holds the prompt, for errors.
        usage: A stream ends with the usage.
    """

    items: list[dict[str, Any]]
    choices: int
    field: str
    stream: bool
    usage: bool


_TEXT_KEYS = (
    "model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed", "stop", "n", "user",
)  # fmt: skip


def read_chat(document: Mapping[str, Any], spec: ModelSpec, signature: Signature) -> TextRequest:
    """Read a request for the next message of a chat.

    Raises:
        InvalidInput, UnsupportedParameter, PayloadTooLarge, ModelNotFound: As the message says.
    """
    fields = Fields(document)
    check_model(fields, spec)
    messages = _messages(fields.take("messages"))
    longest = fields.integer("max_completion_tokens", low=1, high=2**31)
    known = (*_TEXT_KEYS, "messages", "max_completion_tokens")
    return _read_text(fields, [{"messages": messages}], "messages", longest, known, spec, signature)


def read_completions(document: Mapping[str, Any], spec: ModelSpec, signature: Signature) -> TextRequest:
    """Read a request for the continuation of one or more texts.

    Raises:
        InvalidInput, UnsupportedParameter, PayloadTooLarge, ModelNotFound: As the message says.
    """
    fields = Fields(document)
    check_model(fields, spec)
    most = spec.limits.max_items
    prompts: list[dict[str, Any]] = [{"prompt": text} for text in _texts(fields.take("prompt"), "prompt", most=most)]
    return _read_text(fields, prompts, "prompt", None, (*_TEXT_KEYS, "prompt"), spec, signature)


def _read_text(
    fields: Fields,
    prompts: list[dict[str, Any]],
    field: str,
    longest: int | None,
    known: Iterable[str],
    spec: ModelSpec,
    signature: Signature,
) -> TextRequest:
    max_tokens = fields.integer("max_tokens", low=1, high=2**31)
    if longest is not None and max_tokens not in (None, longest):
        raise InvalidInput(
            f"is {max_tokens}, and max_completion_tokens is {longest}; send one of them", place="max_tokens"
        )
    settings = {
        "max_tokens": max_tokens if longest is None else longest,
        "temperature": fields.number("temperature", low=0, high=2),
        "top_p": _top_p(fields),
        "stop": _stops(fields.take("stop")),
    }
    parameters = {name: value for name, value in settings.items() if value is not None}
    seed = fields.integer("seed", low=-(2**63), high=2**63 - 1)
    choices = fields.integer("n", low=1, high=MAX_CHOICES) or 1
    stream = fields.boolean("stream")
    usage = _stream_usage(fields.take("stream_options"), stream)
    parameters |= fields.rest(signature, known)
    for name in parameters if seed is None else (*parameters, "seed"):
        if name not in signature.parameters:
            raise UnsupportedParameter(f"model {spec.name!r} does not read it", place=name)
    if len(prompts) * choices > spec.limits.max_items:
        asked = f"{len(prompts)} prompts with {choices} choices each"
        raise PayloadTooLarge(f"{asked}, and a request may have {spec.limits.max_items} items", place=field)
    items = []
    for prompt in prompts:
        for choice in range(choices):
            own = parameters if seed is None else parameters | {"seed": _following_seed(seed, choice)}
            items.append(prompt | {"parameters": own} if own else dict(prompt))
    return TextRequest(items, choices, field, stream, usage)


def _following_seed(seed: int, choice: int) -> int:
    return seed + choice if seed + choice < 2**63 else seed + choice - 2**64


def _top_p(fields: Fields) -> float | None:
    value = fields.number("top_p", low=0, high=1)
    if value == 0:
        raise InvalidInput("must be above 0; for the likeliest token each time, set temperature to 0", place="top_p")
    return value


def _stops(value: object) -> list[str] | None:
    if value is None or value == []:
        return None
    stops = [value] if type(value) is str else value
    if type(stops) is not list or not all(type(stop) is str and stop for stop in stops):
        raise InvalidInput("must be a string that is not empty, or a list of such", place="stop")
    if len(stops) > _MAX_STOPS:
        raise InvalidInput(f"has {len(stops)} strings, and may have {_MAX_STOPS}", place="stop")
    return stops


def _stream_usage(options: object, stream: bool) -> bool:
    if options is None:
        return False
    if type(options) is not dict:
        raise InvalidInput(f"must be an object, not {json_type(options)}", place="stream_options")
    if not stream:
        raise InvalidInput("is only for stream: true", place="stream_options")
    fields = Fields(options)
    usage = fields.boolean("include_usage")
    fields.boolean("include_obfuscation")
    try:
        fields.rest(Signature((), ()), ("include_usage",))
    except UnsupportedParameter as error:
        raise UnsupportedParameter(error.message, place=f"stream_options.{error.place}") from None
    return usage


def _messages(value: object) -> list[dict[str, str]]:
    if type(value) is not list or not value:
        what = "is missing" if value is None else f"must be a list of messages, not {json_type(value)}"
        raise InvalidInput("is an empty list" if value == [] else what, place="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(message: object, place: str) -> dict[str, str]:
    if type(message) is not dict:
        raise InvalidInput(f"must be an object, not {json_type(message)}", place=place)
    for key, value in message.items():
        if key in ("role", "content") or (key in _IDLE_OF_MESSAGE and value in (None, [])):
            continue
        if key == "name" and type(value) is str:
            continue
        what = (
            "is not supported here"
            if key in _IDLE_OF_MESSAGE
            else f"is no key of a message{near(key, ['role', 'content', 'name'])}"
        )
        raise UnsupportedParameter(what, place=f"{place}.{key[:80]}")
    role = message.get("role")
    if type(role) is not str or role not in _ROLES:
        raise InvalidInput(f"must be one of {', '.join(_ROLES)}, not {quoted(role)}", place=f"{place}.role")
    return {"role": _ROLES[role], "content": _content(message.get("content"), f"{place}.content")}


_IDLE_OF_MESSAGE = frozenset(("name", "tool_calls", "tool_call_id", "function_call", "refusal", "audio", "annotations"))


def _content(content: object, place: str) -> str:
    if type(content) is str:
        return content
    if type(content) is not list or not content:
        what = "is missing" if content is None else "must be a string or a list of text parts"
        raise InvalidInput(what, place=place)
    texts = []
    for index, part in enumerate(content):
        where = f"{place}[{index}]"
        if type(part) is not dict:
            raise InvalidInput(f"must be an object, not {json_type(part)}", place=where)
        if part.get("type") != "text":
            raise InvalidInput(
                f"must be 'text', not {quoted(part.get('type'))}: the model reads text only", place=f"{where}.type"
            )
        text = part.get("text")
        if type(text) is not str:
            raise InvalidInput(f"must be a string, not {json_type(text)}", place=f"{where}.text")
        unknown = next((key for key in part if key not in ("type", "text")), None)
        if unknown is not None:
            raise UnsupportedParameter("is no key of a text part", place=f"{where}.{unknown[:80]}")
        texts.append(text)
    return "".join(texts)


class TextAnswer:
    """The answer to a chat or a completion, whole or in chunks.

    Args:
        chat: In the chat's words, else in those of completions.
        number: The answer's id, without its prefix.
        created: Unix time, seconds.
    """

    def __init__(self, request: TextRequest, *, chat: bool, number: str, created: int, model: str) -> None:
        self._request = request
        self._chat = chat
        self._frame = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{number}", "created": created, "model": model}

    def whole(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the answer from one result a choice."""
        choices = []
        for index, result in enumerate(results):
            body = (
                {"message": {"role": "assistant", "content": result["text"]}}
                if self._chat
                else {"text": result["text"]}
            )
            choices.append({"index": index, **body, "logprobs": None, "finish_reason": result["finish_reason"]})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._frame, "object": kind, "choices": choices, "usage": self.usage(results)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the chunk that opens a choice: a chat's role."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self._chat else None

    def chunks(self, index: int, part: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the chunks of a part of a choice; none where it says nothing yet."""
        chunks = []
        text, reason = part.get("text", ""), part.get("finish_reason")
        if text:
            chunks.append(self._chunk(index, {"content": text}, None))
        if reason is not None:
            chunks.append(self._chunk(index, {}, reason))
        return chunks

    def _chunk(self, index: int, delta: dict[str, str], reason: str | None) -> dict[str, Any]:
        body: dict[str, Any] = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice = {"index": index, **body, "logprobs": None, "finish_reason": reason}
        chunk = {**self._frame, "object": self._kind_of_chunk, "choices": [choice]}
        return {**chunk, "usage": None} if self._request.usage else chunk

    def closing(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """Return the chunk that closes the stream: the usage, where it was asked for."""
        if not self._request.usage:
            return None
        return {**self._frame, "object": self._kind_of_chunk, "choices": [], "usage": self.usage(results)}

    @property
    def _kind_of_chunk(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def usage(self, results: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Return the tokens: each prompt's once, every choice's."""
        prompt = sum(int(result["prompt_tokens"]) for result in results[:: self._request.choices])
        completion = sum(int(result["completion_tokens"]) for result in results)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


# Speech


@dataclass(frozen=True, slots=True)
class TranscriptionRequest:
    """A parsed `POST /v1/audio/transcriptions`.

    Args:
        response_format: `json`, `text` or `verbose_json`.
        language: What the answer says the language is.
    """

    item: dict[str, Any]
    response_format: str
    language: str


_FORM_NUMBERS = ("temperature",)
_FORM_BOOLEANS = {"true": True, "false": False}


def read_transcription(form: Mapping[str, list[Part]], spec: ModelSpec, signature: Signature) -> TranscriptionRequest:
    """Read a request for the words of a recording.

    Raises:
        InvalidInput, UnsupportedParameter, ModelNotFound: As the message says.
    """
    files = form.get("file", [])
    if len(files) != 1:
        raise InvalidInput("is missing" if not files else "stands more than once", place="file")
    if not files[0].content:
        raise InvalidInput("is empty", place="file")
    fields = Fields({name: _form_value(name, parts) for name, parts in form.items() if name != "file"})
    check_model(fields, spec)
    response_format = fields.string("response_format") or "json"
    if response_format not in ("json", "text", "verbose_json"):
        raise UnsupportedParameter(
            f"must be json, text or verbose_json, not {response_format!r:.60}", place="response_format"
        )
    language = fields.string("language")
    if fields.string("prompt"):
        raise UnsupportedParameter("is not supported here", place="prompt")
    if fields.number("temperature", low=0, high=1):
        raise UnsupportedParameter("only 0 is supported: the words are decoded greedily", place="temperature")
    if fields.boolean("stream"):
        raise UnsupportedParameter("is not supported here: the answer comes whole", place="stream")
    for name in ("timestamp_granularities[]", "timestamp_granularities", "chunking_strategy"):
        if fields.take(name) is not None:
            raise UnsupportedParameter("is not supported here", place=name)
    known = ("file", "model", "response_format", "language")
    parameters = fields.rest(signature, known)
    if language:
        if "language" not in signature.parameters:
            raise UnsupportedParameter(f"model {spec.name!r} does not read it", place="language")
        parameters["language"] = language
    item: dict[str, Any] = {"audio": files[0].content}
    if parameters:
        item["parameters"] = parameters
    spoken = language or str(getattr(spec.task_options(), "language", ""))
    return TranscriptionRequest(item, response_format, spoken)


def _form_value(name: str, parts: list[Part]) -> object:
    if len(parts) > 1 and not name.endswith("[]"):
        raise InvalidInput("stands more than once", place=name)
    if parts[0].filename is not None:
        raise UnsupportedMedia("is a file, and only `file` is one", place=name)
    try:
        text = parts[0].content.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput("is not UTF-8", place=name) from error
    if name in _FORM_NUMBERS:
        try:
            return float(text)
        except ValueError as error:
            raise InvalidInput(f"{text[:60]!r} is no number", place=name) from error
    return _FORM_BOOLEANS.get(text, text)


def transcription_answer(request: TranscriptionRequest, result: Mapping[str, Any]) -> dict[str, Any] | str:
    """Return the answer: a string for `text`, else an object; `verbose_json` has no segments: the model tells none."""
    text = result["text"]
    text = text.decode() if isinstance(text, bytes) else str(text)
    if request.response_format == "text":
        return text + "\n"
    duration = float(result["duration_s"])
    if request.response_format == "json":
        return {"text": text, "usage": {"type": "duration", "seconds": round(duration, 3)}}
    return {"task": "transcribe", "language": request.language, "duration": round(duration, 3), "text": text}


def model_object(name: str) -> dict[str, Any]:
    """Return a model as `GET /v1/models` lists it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "roundhouse"}
