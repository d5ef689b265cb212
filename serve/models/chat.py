"""Chat messages become prompt tokens in which only the template, never a message's text, can write special tokens."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from serve.errors import InvalidInput, LoadError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROLES = ("system", "user", "assistant")

#: Characters of the first look at a long text, for each token that there is room for; most texts have fewer.
_CHARACTERS_PER_TOKEN = 16

#: Tokens at the end of a cut text that may depend on where it was cut.
_LONGEST_WORD = 100


def tokenise(tokenizer: Tokenizer, text: str, *, room: int, add_special_tokens: bool = True) -> list[int]:
    """Return the tokens of a text; of one with more than `room`, perhaps only the first ones, but more than `room`."""

    def encode(part: str) -> list[int]:
        # `encode` would hold the GIL, and with it the event loop, for as long as it takes.
        ids: list[int] = tokenizer.encode_batch_fast([part], add_special_tokens=add_special_tokens)[0].ids
        return ids

    end = (room + _LONGEST_WORD) * _CHARACTERS_PER_TOKEN
    while end < len(text):
        first = encode(text[:end])[:-_LONGEST_WORD]
        if len(first) > room:
            return first
        end *= 4
    return encode(text)


class ChatTemplate:
    """A model's Jinja chat template, rendered in a sandbox and tokenised.

    A special token's text inside a message (`<|im_end|>` typed by a user) is tokenised as plain text: a private mark
    splits it before rendering, and the rendered text is tokenised in the pieces between the marks. Text without
    such a token gets exactly the tokens of the rendered text.

    Args:
        source: The template, as tokenizer_config.json holds it.
        tokenizer: The model's.
        variables: What else the template may read: `bos_token`, `eos_token`.

    Raises:
        LoadError: The template is not valid Jinja.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        environment.filters["tojson"] = _to_json
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise LoadError(f"the chat template is not valid: {error}") from error
        self._tokenizer, self._variables = tokenizer, dict(variables)
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        starts = "|".join(map(re.escape, special))
        self._special = re.compile(f"(?=(?:{starts})).", re.DOTALL) if special else None
        # What the template writes beside a message could complete these.
        self._heads = tuple({token[cut:] for token in special for cut in range(1, len(token))})
        self._tails = tuple({token[:cut] for token in special for cut in range(1, len(token))})
        self._mark = f"\ue000{secrets.token_hex(16)}\ue001"

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return the prompt's text, up to where the assistant's answer begins.

        Raises:
            InvalidInput: The template refuses the messages (the order of their roles, for one).
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._variables)
        except TemplateError as error:
            raise InvalidInput(f"the model's chat template refuses them: {error}", place="messages") from error

    def encode(self, messages: Sequence[Mapping[str, str]], *, room: int) -> list[int]:
        """Return the prompt's tokens for messages as `read_messages` gives them, cut as `tokenise` does.

        Raises as `render`.
        """
        split = [{**message, "content": self._split(message["content"])} for message in messages]
        tokens: list[int] = []
        for piece in self.render(split).split(self._mark):
            if len(tokens) > room:
                break
            tokens += tokenise(self._tokenizer, piece, room=room - len(tokens), add_special_tokens=False)
        return tokens

    def _split(self, content: str) -> str:
        """Mark each place where a special token begins, after its first character, and the ends where one may lie."""
        if self._special is None:
            return content
        before = self._mark if content.startswith(self._heads) else ""
        after = self._mark if content.endswith(self._tails) else ""
        return before + self._special.sub(lambda found: found[0] + self._mark, content) + after


def read_messages(value: object) -> list[dict[str, str]]:
    """Check the messages of a chat request and return each as its role and its text.

    Raises:
        InvalidInput: They are not a list of {"role", "content"} with a known role, and text or parts of text.
    """
    if not isinstance(value, list | tuple) or not value:
        raise InvalidInput("must be a list of at least one message", place="messages")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _read_message(message: object, place: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise InvalidInput(f"must be an object, got {type(message).__name__}", place=place)
    for key in message:
        if key not in ("role", "content"):
            raise InvalidInput("is not supported; a message has role and content", place=f"{place}.{key}")
    role = message.get("role")
    if role not in ROLES:
        raise InvalidInput(f"must be one of {', '.join(ROLES)}, got {role!r}", place=f"{place}.role")
    return {"role": role, "content": _read_content(message.get("content"), f"{place}.content")}


def _read_content(content: object, place: str) -> str:
    if isinstance(content, str):
        return _whole(content, place)
    if not isinstance(content, list | tuple):
        raise InvalidInput(f"must be a string or a list of text parts, got {type(content).__name__}", place=place)
    return "".join(_read_part(part, f"{place}[{index}]") for index, part in enumerate(content))


def _read_part(part: object, place: str) -> str:
    if not isinstance(part, Mapping):
        raise InvalidInput(f"must be an object, got {type(part).__name__}", place=place)
    if part.get("type") != "text":
        raise InvalidInput(f"must be 'text', got {part.get('type')!r}; the model reads text", place=f"{place}.type")
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidInput(f"must be a string, got {type(text).__name__}", place=f"{place}.text")
    return _whole(text, place)


def _whole(text: str, place: str) -> str:
    """Refuse half of a surrogate pair, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"is not Unicode text: a lone surrogate at character {error.start}", place=place) from error
    return text


def read_template(folder: Path, tokenizer: Tokenizer, override: str | None) -> ChatTemplate | None:
    """Return the chat template of a Hugging Face folder, or None where it has none.

    Args:
        folder: tokenizer_config.json, and chat_template.jinja where the template has a file of its own.
        override: A template that takes the place of the model's.

    Raises:
        LoadError: A file is not readable, or the template is not valid.
    """
    try:
        path, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        source = override or (own.read_text() if own.is_file() else config.get("chat_template"))
    except (OSError, ValueError) as error:
        raise LoadError(f"the tokenizer's configuration is not readable: {error}") from error
    if isinstance(source, list):  # several named templates
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if source is None:
        return None
    variables = {name: _token_text(config[name]) for name in ("bos_token", "eos_token") if config.get(name)}
    return ChatTemplate(source, tokenizer, variables)


def _token_text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
