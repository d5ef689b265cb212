"""Text generation with continuous batching, so that streams join and leave between steps and share every step."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer

from serve.errors import InvalidInput, LoadError, PredictionFailed, UnsupportedParameter
from serve.models.base import Item, LoadContext, Signature, Step, TensorSpec
from serve.models.chat import read_messages, read_template, tokenise
from serve.models.devices import use_threads
from serve.models.gguf_weights import convert_gguf
from serve.models.llama import Llama, Piece
from serve.models.sampling import IncrementalDecoder, Sampler, SamplingSettings, StopStrings

if TYPE_CHECKING:
    from torch import Tensor

    from serve.models.chat import ChatTemplate

#: Prompt tokens that one step reads: while nobody else waits for a token, and while somebody does. The second bounds
#: what a long prompt adds to its neighbours' time between tokens.
_PIECE = {"cpu": (256, 64), "cuda": (2048, 512)}

_MAX_STOPS = 16
_MAX_STOP_CHARACTERS = 256

_PARAMETERS = {
    "max_tokens": "Tokens of the answer at most; an integer from 1.",
    "temperature": "0 (default) takes the likeliest token each time; up to 2 for more variety.",
    "top_p": "Draw among the likeliest tokens that together reach this probability; above 0, up to 1 (default).",
    "seed": "An integer from 0 to 2^63 - 1; the same seed draws the same tokens.",
    "stop": f"Texts that end the answer and are not part of it; a list of at most {_MAX_STOPS} strings.",
}

_SIGNATURE = Signature(
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
    """A request that is ready for a slot."""

    prompt: tuple[int, ...]
    settings: SamplingSettings


class _Stream:
    """One request in its slot; it is `reading` until the cache holds all its tokens but the one to decode next."""

    def __init__(self, key: int, slot: int, prepared: Prepared, decoder: IncrementalDecoder, limit: int) -> None:
        self.key, self.slot = key, slot
        self.tokens = list(prepared.prompt)
        self.reading = True
        self.cached = 0  # tokens in the cache
        self.overflowed = False  # the cache may hold what is no number
        self.sampler = Sampler(prepared.settings)
        self._prompt_tokens, self._limit = len(prepared.prompt), len(prepared.prompt) + limit
        self._decoder, self._stops = decoder, StopStrings(prepared.settings.stop)

    def take(self, token: int, *, ends: bool) -> Step:
        """Add a token and return what it shows; one that `ends` the sequence is no part of the answer."""
        if ends:
            return self._finish("", "stop", [])
        self.tokens.append(token)
        shown, stopped = self._stops.feed(self._decoder.feed(token))
        if stopped:
            return self._last(shown, "stop", [token])
        if len(self.tokens) == self._limit:
            return self._finish(shown, "length", [token])
        return Step(self.key, {"text": shown, "token_ids": [token]})

    def _finish(self, shown: str, reason: str, token_ids: list[int]) -> Step:
        rest, stopped = self._stops.feed(self._decoder.flush())
        return self._last(shown + rest + self._stops.flush(), "stop" if stopped else reason, token_ids)

    def _last(self, shown: str, reason: str, token_ids: list[int]) -> Step:
        output = {
            "text": shown,
            "token_ids": token_ids,
            "finish_reason": reason,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": len(self.tokens) - self._prompt_tokens,
        }
        return Step(self.key, output, done=True)


class TextGeneration:
    """A model of the llama family, from a GGUF file or a Hugging Face folder.

    `prepare` takes {"prompt": bytes | str} or {"messages": [{"role", "content"}, ...]}, and {"parameters": {...}}.
    In a prompt, special tokens are special, as the model's own tokenizer has it; in messages they are plain text.
    """

    signature = _SIGNATURE
    slots = 0

    def load(self, context: LoadContext) -> None:
        """Load weights and tokenizer, converting a GGUF file into the cache at the first time.

        Raises:
            LoadError: No model here, or one of another family; the message names what is supported.
        """
        use_threads(context.threads)
        options = context.options
        folder = _model_folder(context)
        self.slots, self._context_tokens = options.slots, options.context_tokens
        self._room = options.context_tokens - 1  # for a prompt and the first token of its answer
        self._default_max_tokens = options.default_max_tokens
        self._tokenizer = _read_tokenizer(folder)
        self._chat: ChatTemplate | None = read_template(folder, self._tokenizer, options.chat_template)
        self._llama = Llama(
            folder,
            device=context.device,
            dtype=getattr(torch, context.dtype),
            slots=options.slots,
            context_tokens=options.context_tokens,
            progress=context.progress,
        )
        self._end = self._llama.config.eos_token_ids | _generation_ends(folder)
        self._piece = _PIECE[context.device]
        self._free = list(range(options.slots))
        self._streams: dict[int, _Stream] = {}
        self._keys = itertools.count()

    def prepare(self, item: Item) -> Prepared:
        """Tokenise and check one item.

        Raises:
            UnsupportedParameter: A parameter that this model does not read.
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
        if max(tokens) >= (size := self._llama.config.vocab_size):
            text = self._tokenizer.id_to_token(max(tokens))
            raise InvalidInput(
                f"holds token {max(tokens)} ({text!r}), which is outside the model's vocabulary of {size} tokens; "
                "leave it out",
                place=place,
            )
        return Prepared(tuple(tokens), settings)

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

    def admit(self, prepared: Prepared) -> int:
        """Take a stream into a free slot and return its key; its prompt is read by `step`."""
        slot = min(self._free)
        self._free.remove(slot)
        key = next(self._keys)
        limit = min(prepared.settings.max_tokens, self._context_tokens - len(prepared.prompt))
        self._streams[key] = _Stream(key, slot, prepared, IncrementalDecoder(self._tokenizer), limit)
        return key

    def release(self, key: int) -> None:
        """Free the slot of a stream whose caller left."""
        stream = self._streams.pop(key)
        if stream.overflowed:
            self._llama.wipe(stream.slot, count=len(stream.tokens))
        self._free.append(stream.slot)

    def step(self) -> Sequence[Step]:
        """Compute a token of every stream whose tokens are read, then a piece of the tokens of the others."""
        running = sorted((stream for stream in self._streams.values() if not stream.reading), key=lambda s: s.slot)
        steps = self._decode(running) if running else []
        steps += self._read()
        for step in steps:
            if step.done:
                self.release(step.key)
        return steps

    def _decode(self, streams: Sequence[_Stream]) -> list[Step]:
        rows = self._llama.decode(
            [stream.tokens[-1] for stream in streams],
            slots=[stream.slot for stream in streams],
            starts=[stream.cached for stream in streams],
        )
        likeliest = rows.argmax(-1).tolist()
        _note_overflows(streams, rows, likeliest)
        for stream in streams:
            stream.cached += 1
        return [self._advance(*one) for one in zip(streams, rows, likeliest, strict=True)]

    def _read(self) -> Iterator[Step]:
        """Read on in the streams that are not read yet, and give each that is through its next token."""
        streams = [stream for stream in self._streams.values() if stream.reading]
        room = self._piece[0 if len(streams) == len(self._streams) else 1]
        pieces: list[tuple[_Stream, Piece]] = []
        for stream, count in zip(streams, share_room([len(s.tokens) - s.cached for s in streams], room), strict=True):
            if count:
                tokens = stream.tokens[stream.cached : stream.cached + count]
                pieces.append((stream, Piece(tokens, slot=stream.slot, start=stream.cached)))
        if not pieces:
            return
        rows = self._llama.prefill([piece for _, piece in pieces])
        likeliest = rows.argmax(-1).tolist()
        _note_overflows([stream for stream, _ in pieces], rows, likeliest)
        for (stream, piece), logits, token in zip(pieces, rows, likeliest, strict=True):
            stream.cached = piece.start + len(piece.tokens)
            stream.reading = stream.cached < len(stream.tokens)
            if stream.overflowed or not stream.reading:
                yield self._advance(stream, logits, token)

    def _advance(self, stream: _Stream, logits: Tensor, likeliest: int) -> Step:
        if stream.overflowed:
            error = PredictionFailed("the model's numbers overflowed; try dtype bfloat16 or float32 in its declaration")
            return Step(stream.key, None, done=True, error=error)
        if stream.sampler.greedy:
            return stream.take(likeliest, ends=likeliest in self._end)
        try:
            token = stream.sampler.draw(logits)
        except RuntimeError as error:  # torch's word for probabilities that are not numbers
            return Step(stream.key, None, done=True, error=PredictionFailed(f"no token could be drawn: {error}"))
        return stream.take(token, ends=token in self._end)


def _note_overflows(streams: Sequence[_Stream], logits: Tensor, likeliest: Sequence[int]) -> None:
    """Mark the streams whose greatest logit is no finite number; one that is no number counts as the greatest."""
    greatest = logits.gather(1, torch.tensor(likeliest, device=logits.device).unsqueeze(1)).flatten().tolist()
    for stream, logit in zip(streams, greatest, strict=True):
        stream.overflowed |= not math.isfinite(logit)


def share_room(left: Sequence[int], room: int) -> list[int]:
    """Return how many tokens to read of each prompt, given how many are left of each, the oldest prompt first.

    The oldest has half of the room, so that it is never starved; the rest goes to those with the fewest left, so that
    short prompts do not wait for long ones.
    """
    if not left:
        return []
    shares = [min(left[0], (room + 1) // 2), *[0] * (len(left) - 1)]
    room -= shares[0]
    for index in sorted(range(len(left)), key=left.__getitem__):
        more = min(left[index] - shares[index], room)
        shares[index] += more
        room -= more
    return shares


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


def _model_folder(context: LoadContext) -> Path:
    """Return the folder in the Hugging Face layout, converted where the source is a GGUF file."""
    if (context.folder / "config.json").is_file():
        return context.folder
    files = sorted(context.folder.glob("*.gguf"))
    if len(files) == 1:
        return convert_gguf(files[0], context.cache_dir, context.progress)
    found = ", ".join(file.name for file in files) or "neither"
    raise LoadError(f"{context.folder} must hold one GGUF file, or config.json and safetensors; found {found}")


def _read_tokenizer(folder: Path) -> Tokenizer:
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


def _generation_ends(folder: Path) -> frozenset[int]:
    """Return the end-of-sequence tokens that generation_config.json adds to config.json's."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return frozenset()
    try:
        ends = json.loads(path.read_text()).get("eos_token_id")
        return frozenset(map(int, ends if isinstance(ends, list) else [] if ends is None else [ends]))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise LoadError(f"{path.name} of the model has no usable eos_token_id: {error!r}") from error
