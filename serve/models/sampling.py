"""From logits to text, a stream at a time: which token, where the answer stops, and what may already be shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: Tokens that a top_p draw looks at before it sorts the whole vocabulary.
_CANDIDATES = 512

#: Tokens that wait for the end of a character before it is asked whether some of them are whole.
_PENDING = 8

#: Bytes of the longest character in UTF-8, and so the tokens at most.
_LONGEST_CHARACTER = 4

#: A temperature below this is 0: dividing by it would overflow, and only tokens that all but tie could differ.
_LOWEST_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How one answer is drawn.

    Args:
        max_tokens: Tokens of the answer at most.
        temperature: 0 (or next to it) takes the likeliest token; above that, logits are divided by it.
        top_p: Draw among the likeliest tokens whose probability together reaches this (arXiv:1904.09751).
        seed: Makes the draws repeatable; none draws anew each time.
        stop: Texts that end the answer; they are not part of it.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether each token is the likeliest."""
        return self.temperature < _LOWEST_TEMPERATURE


class Sampler:
    """Draws the tokens of one stream with a generator of its own, so that its neighbours do not change them."""

    def __init__(self, settings: SamplingSettings) -> None:
        self.greedy = settings.greedy
        self._temperature, self._top_p = settings.temperature, settings.top_p
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    def draw(self, logits: Tensor) -> int:
        """Return a token for float32 logits [vocab_size]; a greedy stream takes their argmax instead."""
        probabilities = torch.softmax(logits.cpu() / self._temperature, dim=-1)
        if self._top_p == 1:
            return int(torch.multinomial(probabilities, 1, generator=self._generator))
        likely, tokens = _nucleus(probabilities, self._top_p)
        return int(tokens[torch.multinomial(likely, 1, generator=self._generator)])


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the probabilities and ids of the fewest likeliest tokens that together reach `top_p`; at least one."""
    values, tokens = probabilities.topk(min(_CANDIDATES, len(probabilities)))
    if values.sum() < top_p:
        values, tokens = probabilities.sort(descending=True)
    kept = int((values.cumsum(-1) - values < top_p).sum()) or 1
    return values[:kept], tokens[:kept]


class StopStrings:
    """Finds stop strings in text that arrives in pieces, holding back what could become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Return what may be shown now, and whether a stop string is complete; after that, feed no more.

        The stop string that is complete first ends the text; of two complete at the same character, the longer one.
        """
        self._held += text
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)[1]], ""
            return shown, True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """Return what is held back, once it is known that no more follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`, without being all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


class IncrementalDecoder:
    """Turns tokens into text as they come; the pieces together equal the text of all tokens decoded at once.

    A token may end within a character, whose bytes then decode to U+FFFD; such an end waits for the next token.
    Decoding starts from the last place that was whole, with one piece before it, because the first token of a text
    may decode differently (a dropped leading space).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode: Callable[[list[int]], str] = tokenizer.decode
        self._tokens: list[int] = []
        self._context = 0
        self._shown = 0

    def feed(self, token: int) -> str:
        """Return the text that `token` completes, perhaps none."""
        self._tokens.append(token)
        before, text = self._texts()
        if text.endswith("\ufffd"):
            return self._whole_part(before, text) if (len(self._tokens) - self._shown) % _PENDING == 0 else ""
        if len(text) <= len(before):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return text[len(before) :]

    def flush(self) -> str:
        """Return what is left when no more follows: a broken character, or nothing."""
        before, text = self._texts()
        self._context = self._shown = len(self._tokens)
        return text[len(before) :]

    def _whole_part(self, before: str, text: str) -> str:
        """Return what no later token changes of a broken text, so that long ones are not decoded again and again.

        A character that goes on across a cut decodes differently apart, so a cut that changes nothing is its end.
        """
        for cut in range(len(self._tokens) - 1, len(self._tokens) - 1 - _LONGEST_CHARACTER, -1):
            head, tail = self._decode(self._tokens[self._context : cut]), self._decode(self._tokens[cut:])
            if head + tail == text and len(head) > len(before):
                self._context, self._shown = self._shown, cut
                return head[len(before) :]
        return ""

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._tokens[self._context : self._shown]), self._decode(self._tokens[self._context :])
