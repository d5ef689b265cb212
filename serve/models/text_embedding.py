"""Text to vectors with encoders of the BERT family, tokenised ahead of the model and computed without padding."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from serve.errors import InvalidInput, LoadError
from serve.models.base import Item, LoadContext, Signature, TensorSpec
from serve.models.bert import load_bert
from serve.spec import EmbeddingOptions

#: Characters of the first look at a long text, for each token that the model takes; most texts have fewer.
_CHARACTERS_PER_TOKEN = 16

#: Tokens of the longest word of a WordPiece vocabulary: no more of a cut text depends on where it was cut.
_LONGEST_WORD = 100


class TextEmbedding:
    """A `Model`: `text` BYTES [-1] -> `embedding` FP32 [-1, D] and `token_count` INT32 [-1]."""

    signature: Signature
    padded = False

    def load(self, context: LoadContext) -> None:
        """Load config.json, model.safetensors and tokenizer.json of `context.folder`.

        Raises:
            LoadError: A file is absent or damaged, the architecture is not supported, or `max_tokens` is too large.
        """
        self._options: EmbeddingOptions = context.options
        context.progress("weights", 0, 0)
        self._encoder = load_bert(
            context.folder,
            device=context.device,
            dtype=context.dtype,
            threads=context.threads,
            cache_dir=context.cache_dir,
        )
        config = self._encoder.config
        self._tokenizer = _load_tokenizer(context.folder, vocab_size=config.vocab_size)
        self._special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        self._max_tokens = _token_limit(context.folder, self._options, positions=config.max_position_embeddings)
        if self._max_tokens <= self._special:
            raise LoadError(
                f"options.max_tokens is {self._max_tokens}; the tokenizer alone adds {self._special} to every text"
            )
        self._tokenizer.enable_truncation(self._max_tokens)
        self.signature = _signature(config.hidden_size)

    def prepare(self, item: Item) -> list[int]:
        """Return the token ids of `item["text"]`, special tokens included.

        Raises:
            InvalidInput: It is absent, no UTF-8, holds no token, or is too long while `truncate` is off.
        """
        encoding = self._encode(_decoded(item.get("text")))
        if len(encoding.ids) <= self._special:
            raise InvalidInput("the text is empty", place="text")
        if encoding.overflowing and not self._options.truncate:
            raise InvalidInput(
                f"the text has more than the {self._max_tokens} tokens that the model takes; shorten it, "
                "or set options.truncate in the model's declaration",
                place="text",
            )
        ids: list[int] = encoding.ids
        return ids

    def cost(self, prepared: Sequence[int]) -> int:
        """Return the item's tokens."""
        return len(prepared)

    def predict(self, batch: Sequence[Sequence[int]]) -> list[Mapping[str, Any]]:
        """Return `embedding` (float32 [D]) and `token_count` of each row."""
        rows = self._encoder.pooled(batch, self._options.pooling)
        if self._options.normalize:
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return [{"embedding": row, "token_count": len(ids)} for row, ids in zip(rows, batch, strict=True)]

    def _encode(self, text: str) -> Encoding:
        """Tokenise as much of the text as decides its first `max_tokens` tokens."""
        end = self._max_tokens * _CHARACTERS_PER_TOKEN
        while end < len(text):
            encoding = self._tokens(text[:end])
            if sum(len(part.ids) for part in encoding.overflowing) > _LONGEST_WORD:
                return encoding
            end *= 4
        return self._tokens(text)

    def _tokens(self, text: str) -> Encoding:
        # `encode` would hold the GIL, and with it the event loop, for as long as it takes.
        return self._tokenizer.encode_batch_fast([text])[0]


def _decoded(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InvalidInput(f"the text is not UTF-8: {error}", place="text") from error
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"the text is not UTF-8: {error}", place="text") from error
        return value
    raise InvalidInput(f"the text is of type {type(value).__name__}; a string is wanted", place="text")


def _load_tokenizer(folder: Path, *, vocab_size: int) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the bindings raise nothing narrower
        raise LoadError(f"{path} cannot be read: {error}") from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise LoadError(f"{path} has {tokenizer.get_vocab_size()} tokens and the model {vocab_size}")
    tokenizer.no_padding()
    return tokenizer


def _token_limit(folder: Path, options: EmbeddingOptions, *, positions: int) -> int:
    """Return the longest input: the option's, else what sentence_bert_config.json says, else all positions."""
    if options.max_tokens is not None:
        if options.max_tokens > positions:
            raise LoadError(f"options.max_tokens is {options.max_tokens}; the model has {positions} positions")
        return options.max_tokens
    path = folder / "sentence_bert_config.json"
    if not path.is_file():
        return positions
    try:
        return min(int(json.loads(path.read_text())["max_seq_length"]), positions)
    except (ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} has no usable max_seq_length: {error!r}") from error


def _signature(size: int) -> Signature:
    return Signature(
        inputs=(TensorSpec("text", "BYTES", (-1,), "Text, UTF-8."),),
        outputs=(
            TensorSpec("embedding", "FP32", (-1, size), "The text's vector."),
            TensorSpec("token_count", "INT32", (-1,), "Tokens that the model read, special tokens included."),
        ),
        example={"text": "The quick brown fox jumps over the lazy dog."},
    )
