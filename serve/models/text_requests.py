"""What a request for text says, checked and tokenised the same way whichever engine computes the answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from serve.errors import InvalidInput, LoadError, UnsupportedParameter
from serve.models.base import Item, LoadContext, Signature, TensorSpec
from serve.models.chat import read_messages, tokenise
from serve.models.gguf_weights import convert_gguf
from serve.models.sampling import SamplingSettings

if TYPE_CHECKING:
    from serve.models.chat import ChatTemplate

_MAX_STOPS = 16
_MAX_STOP_CHARACTERS = 256

_PARAMETERS = {
    "max_tokens": "Tokens of the answer at most; an integer from 1.",
    "temperature": "0 (default) takes the likeliest token each time; up to 2 for more variety.",
    "top_p": "Draw among the likeliest tokens that together reach this probability; above 0, up to 1 (default).",
    "seed": "An integer from 0 to 2^63 - 1; the same seed draws the same tokens.",
    "stop": f"Texts that end the answer and are not part of it; a list of at most {_MAX_STOPS} strings.",
}

SIGNATURE = Signature(
    inputs=(TensorSpec("prompt", "BYTES", (-1,), "Text to go on from; special tokens written in it are special"),),
    outputs=(
        TensorSpec("text", "BYTES", (-1,), "The text that follows"),
        TensorSpec("finish_reason", "BYTES", (-1,), "stop: the answer ended; length: max_tokens or the context did"),
        TensorSpec("prompt_tokens", "INT32", (-1,), "Tokens of the prompt"),
        TensorSpec("completion_tokens", "INT32", (-1,), "Tokens of the text"),
    ),
    parameters=_PARAMETERS,
    example={"prompt": b"The capital of France is", "parameters": {"max_tokens": 8}},
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that is ready for a slot.

    Args:
        prompt: Token ids.
        settings: Their `max_tokens` is no more than the context has room for.
    """

    prompt: tuple[int, ...]
    settings: SamplingSettings


class TextRequests:
    """Reads the requests of one model.

    Args:
        tokenizer: The model's.
        chat: The model's chat template; without one, only prompts are taken.
        vocab_size: Tokens that the model has rows for.
        context_tokens: Tokens of a prompt and its answer together, at most.
        default_max_tokens: Length of an answer whose request does not say.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: ChatTemplate | None,
        *,
        vocab_size: int,
        context_tokens: int,
        default_max_tokens: int,
    ) -> None:
        self._tokenizer, self._chat = tokenizer, chat
        self._vocab_size, self._context_tokens = vocab_size, context_tokens
        self._room = context_tokens - 1  # for a prompt and the first token of its answer
        self._default_max_tokens = default_max_tokens

    def read(self, item: Item) -> Prepared:
        """Check and tokenise one item.

        Raises:
            UnsupportedParameter: A parameter that text generation does not know.
            InvalidInput: Anything else that is wrong, with its place.
        """
        for key in item:
            if key not in ("prompt", "messages", "parameters"):
                raise InvalidInput("is not an input of text-generation; it takes prompt or messages", place=str(key))
        if ("prompt" in item) == ("messages" in item):
            raise InvalidInput("give either prompt or messages", place="prompt")
        settings = read_settings(item.get("parameters", {}), default_max_tokens=self._default_max_tokens)
        place = "prompt" if "prompt" in item else "messages"
        tokens = self._encode_prompt(item) if place == "prompt" else self._encode_chat(item)
        if not tokens:
            raise InvalidInput("is empty; text generation needs at least one token", place=place)
        if len(tokens) > self._room:
            raise InvalidInput(
                f"has at least {len(tokens)} tokens; the context of {self._context_tokens} tokens leaves room for "
                f"{self._room} and an answer",
                place=place,
            )
        # The tokenizer of a fine-tune may have tokens that were never given a row; one would fail its whole batch.
        if max(tokens) >= self._vocab_size:
            text = self._tokenizer.id_to_token(max(tokens))
            raise InvalidInput(
                f"holds token {max(tokens)} ({text!r}), which is outside the model's vocabulary of "
                f"{self._vocab_size} tokens; leave it out",
                place=place,
            )
        longest = min(settings.max_tokens, self._context_tokens - len(tokens))
        return Prepared(tuple(tokens), replace(settings, max_tokens=longest))

    def _encode_prompt(self, item: Item) -> list[int]:
        prompt = item["prompt"]
        if not isinstance(prompt, bytes | str):
            raise InvalidInput(f"must be text, got {type(prompt).__name__}", place="prompt")
        try:
            text = prompt.decode() if isinstance(prompt, bytes) else prompt.encode().decode()
        except UnicodeError as error:
            raise InvalidInput(f"is not UTF-8 text: {error}", place="prompt") from error
        return tokenise(self._tokenizer, text, room=self._room)

    def _encode_chat(self, item: Item) -> list[int]:
        messages = read_messages(item["messages"])
        if self._chat is None:
            raise InvalidInput("this model has no chat template; send a prompt", place="messages")
        return self._chat.encode(messages, room=self._room)


def read_settings(parameters: Any, *, default_max_tokens: int) -> SamplingSettings:
    """Check a request's parameters.

    Raises:
        UnsupportedParameter: An unknown one.
        InvalidInput: A value of the wrong type or out of its range.
    """
    if not isinstance(parameters, Mapping):
        raise InvalidInput(f"must be an object, got {type(parameters).__name__}", place="parameters")
    for name in parameters:
        if name not in _PARAMETERS:
            raise UnsupportedParameter(
                f"is not supported by this model; supported: {', '.join(_PARAMETERS)}", place=f"parameters.{name}"
            )

    def number(name: str, kind: type, fits: Callable[[Any], bool], wanted: str, default: Any) -> Any:
        if name not in parameters:
            return default
        value = parameters[name]
        accepted = (int, float) if kind is float else kind
        if isinstance(value, accepted) and not isinstance(value, bool) and fits(value):
            return value
        raise InvalidInput(f"must be {wanted}, got {value!r}", place=f"parameters.{name}")

    return SamplingSettings(
        max_tokens=number("max_tokens", int, lambda v: 1 <= v <= sys.maxsize, "an integer from 1", default_max_tokens),
        temperature=number("temperature", float, lambda v: 0 <= v <= 2, "a number from 0 to 2", 0.0),
        top_p=number("top_p", float, lambda v: 0 < v <= 1, "a number above 0, up to 1", 1.0),
        seed=number("seed", int, lambda v: 0 <= v < 2**63, "an integer from 0 to 2^63 - 1", None),
        stop=_read_stop(parameters.get("stop", [])),
    )


def _read_stop(stop: object) -> tuple[str, ...]:
    if not isinstance(stop, list | tuple) or len(stop) > _MAX_STOPS:
        raise InvalidInput(f"must be a list of at most {_MAX_STOPS} strings, got {stop!r:.80}", place="parameters.stop")
    for index, text in enumerate(stop):
        if not isinstance(text, str) or not 1 <= len(text) <= _MAX_STOP_CHARACTERS:
            raise InvalidInput(
                f"must be a string of 1 to {_MAX_STOP_CHARACTERS} characters, got {text!r:.80}",
                place=f"parameters.stop[{index}]",
            )
    return tuple(stop)


def model_folder(context: LoadContext) -> Path:
    """Return the folder in the Hugging Face layout, converted where the source is a GGUF file; raises LoadError."""
    if (context.folder / "config.json").is_file():
        return context.folder
    files = sorted(context.folder.glob("*.gguf"))
    if len(files) == 1:
        return convert_gguf(files[0], context.cache_dir, context.progress)
    found = ", ".join(file.name for file in files) or "neither"
    raise LoadError(f"{context.folder} must hold one GGUF file, or config.json and safetensors; found {found}")


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a folder in the Hugging Face layout; raises LoadError."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise LoadError(f"{folder} lacks tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise LoadError(f"tokenizer.json is not readable: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
