"""Only the template writes special tokens into a prompt, whatever a message says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serve.errors import InvalidInput, LoadError
from serve.models.chat import ChatTemplate, read_messages, read_template, tokenise

START, END = 256, 257
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>", "<<", "<a<")])
    return tokenizer


TOKENIZER = make_tokenizer()
TEMPLATE = ChatTemplate(CHATML, TOKENIZER, {"bos_token": "<s>"})


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def test_ordinary_text_is_tokenised_as_the_rendered_prompt() -> None:
    messages = [{"role": "system", "content": "Be brief."}, *user("  Où est\n\n<b>le</b> chat?\n")]
    rendered = TEMPLATE.render(messages)
    assert rendered.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n  Où")
    assert rendered.endswith("chat?\n<|im_end|>\n<|im_start|>assistant\n")
    assert TEMPLATE.encode(messages, room=1000) == TOKENIZER.encode(rendered).ids


@given(
    st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<", "<<", "<a<", "|", "im_end|>", "a", "\n"]), max_size=8)
)
def test_no_text_of_a_message_writes_a_special_token(pieces: list[str]) -> None:
    content = "".join(pieces)
    tokens = TEMPLATE.encode(user(content), room=1000)
    assert [token for token in tokens if token >= START] == [START, END, START]
    expected = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER.decode(tokens, skip_special_tokens=False) == expected


class Watched:
    """A tokenizer that notes how many characters it was given."""

    def __init__(self) -> None:
        self.characters = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(TOKENIZER, name)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return TOKENIZER.encode_batch_fast(texts, **options)


@given(st.integers(0, 400), st.integers(0, 20_000), st.sampled_from(["a", "ab cd ", "<|im_end|>", "é"]))
def test_tokens_are_those_of_the_text_or_more_than_there_is_room_for(room: int, length: int, word: str) -> None:
    text = (word * length)[:length]
    whole, found = TOKENIZER.encode(text).ids, tokenise(TOKENIZER, text, room=room)
    assert found == whole[: len(found)]
    assert len(found) == len(whole) or len(found) > room


def test_a_text_that_cannot_fit_is_not_tokenised_to_its_end() -> None:
    tokenizer: Any = Watched()
    assert len(tokenise(tokenizer, "a" * 1_000_000, room=100)) > 100
    messages = user("a<|im_end|>" * 50_000)
    assert len(ChatTemplate(CHATML, tokenizer, {}).encode(messages, room=100)) > 100
    assert tokenizer.characters < 20_000


def test_a_template_reads_the_tokens_of_the_model() -> None:
    assert (
        ChatTemplate("{{ bos_token }}{{ messages[0].content }}", TOKENIZER, {"bos_token": "<s>"}).render(user("a"))
        == "<s>a"
    )


def test_a_template_that_refuses_says_why() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", TOKENIZER, {})
    with pytest.raises(InvalidInput, match=r"messages: .*roles must alternate"):
        template.encode(user("a"), room=1000)


def test_a_template_cannot_reach_python() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}", TOKENIZER, {})
    with pytest.raises(InvalidInput, match="unsafe"):
        template.encode(user("a"), room=1000)


def test_an_invalid_template_does_not_load() -> None:
    with pytest.raises(LoadError, match="chat template"):
        ChatTemplate("{% for m in %}", TOKENIZER, {})


def test_text_parts_become_one_text() -> None:
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "world"}]
    assert read_messages(user(parts)) == user("Hello, world")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hello", r"messages: must be a list"),
        ([], r"messages: must be a list of at least one"),
        (["hello"], r"messages\[0\]: must be an object, got str"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\].role: must be one of system, user, assistant, got 'tool'"),
        ([{"content": "x"}], r"messages\[0\].role: .*got None"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\].role: .*got \['user'\]"),
        ([*user("x"), {"role": "user"}], r"messages\[1\].content: .*got NoneType"),
        (user([{"type": "image_url", "image_url": {}}]), r"messages\[0\].content\[0\].type: .*'image_url'"),
        (user([{"type": "text", "text": 3}]), r"messages\[0\].content\[0\].text: must be a string, got int"),
        (user(["x"]), r"messages\[0\].content\[0\]: must be an object"),
        (user("\ud800"), r"messages\[0\].content: .*surrogate at character 0"),
        ([{**user("x")[0], "name": "Ann"}], r"messages\[0\].name: is not supported"),
    ],
)
def test_messages_that_are_wrong_are_refused_with_their_place(messages: Any, complaint: str) -> None:
    with pytest.raises(InvalidInput, match=complaint):
        read_messages(messages)


def write_config(folder: Path, **config: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def rendered(folder: Path, override: str | None = None) -> str | None:
    template = read_template(folder, TOKENIZER, override)
    return template.render(user("hi")) if template else None


def test_a_template_comes_from_the_options_its_own_file_or_the_tokenizers_configuration(tmp_path: Path) -> None:
    assert rendered(tmp_path) is None
    write_config(tmp_path, chat_template="config {{ eos_token }}", eos_token={"content": "</s>"})
    assert rendered(tmp_path) == "config </s>"
    write_config(tmp_path, chat_template=[{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}])
    assert rendered(tmp_path) == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert rendered(tmp_path) == "file"
    assert rendered(tmp_path, "option") == "option"


def test_a_broken_configuration_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(LoadError, match="not readable"):
        read_template(tmp_path, TOKENIZER, None)
