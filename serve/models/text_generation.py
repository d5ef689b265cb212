"""Text generation with continuous batching, so that streams join and leave between steps and share every step."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from serve.errors import LoadError, PredictionFailed
from serve.models.base import Item, LoadContext, Step
from serve.models.chat import read_template
from serve.models.devices import use_threads
from serve.models.llama import Llama, Piece
from serve.models.sampling import IncrementalDecoder, Sampler, StopStrings
from serve.models.text_requests import SIGNATURE, Prepared, TextRequests, model_folder, read_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

#: Prompt tokens that one step reads: while nobody else waits for a token, and while somebody does. The second bounds
#: what a long prompt adds to its neighbours' time between tokens.
_PIECE = {"cpu": (256, 64), "cuda": (2048, 512)}


class _Stream:
    """One request in its slot; it is `reading` until the cache holds all its tokens but the one to decode next."""

    def __init__(self, key: int, slot: int, prepared: Prepared, decoder: IncrementalDecoder) -> None:
        self.key, self.slot = key, slot
        self.tokens = list(prepared.prompt)
        self.reading = True
        self.cached = 0  # tokens in the cache
        self.overflowed = False  # the cache may hold what is no number
        self.sampler = Sampler(prepared.settings)
        self._prompt_tokens = len(prepared.prompt)
        self._limit = len(prepared.prompt) + prepared.settings.max_tokens
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

    signature = SIGNATURE
    slots = 0

    def load(self, context: LoadContext) -> None:
        """Load weights and tokenizer, converting a GGUF file into the cache at the first time.

        Raises:
            LoadError: No model here, or one of another family; the message names what is supported.
        """
        use_threads(context.threads)
        options = context.options
        folder = model_folder(context)
        self.slots = options.slots
        self._tokenizer = read_tokenizer(folder)
        chat = read_template(folder, self._tokenizer, options.chat_template)
        self._llama = Llama(
            folder,
            device=context.device,
            dtype=getattr(torch, context.dtype),
            slots=options.slots,
            context_tokens=options.context_tokens,
            progress=context.progress,
        )
        self._requests = TextRequests(
            self._tokenizer,
            chat,
            vocab_size=self._llama.config.vocab_size,
            context_tokens=options.context_tokens,
            default_max_tokens=options.default_max_tokens,
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
        return self._requests.read(item)

    def admit(self, prepared: Prepared) -> int:
        """Take a stream into a free slot and return its key; its prompt is read by `step`."""
        slot = min(self._free)
        self._free.remove(slot)
        key = next(self._keys)
        self._streams[key] = _Stream(key, slot, prepared, IncrementalDecoder(self._tokenizer))
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
