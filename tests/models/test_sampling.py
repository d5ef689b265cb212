"""Tokens are drawn, stopped and shown as text without a character too many or too few."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from serve.models.sampling import IncrementalDecoder, Sampler, SamplingSettings, StopStrings


def draws(count: int, logits: torch.Tensor, **settings: object) -> list[int]:
    sampler = Sampler(SamplingSettings(max_tokens=1, **settings))  # type: ignore[arg-type]
    return [sampler.draw(logits) for _ in range(count)]


def test_a_seed_repeats_the_draws_whatever_a_neighbour_draws() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    alone = draws(20, logits, temperature=1.0, seed=7)
    first, second = (Sampler(SamplingSettings(max_tokens=1, temperature=1.0, seed=seed)) for seed in (7, 8))
    together = [(first.draw(logits), second.draw(logits))[0] for _ in range(20)]
    assert together == alone
    assert draws(20, logits, temperature=1.0, seed=8) != alone


def test_without_a_seed_the_draws_differ() -> None:
    logits = torch.zeros(10_000)
    assert draws(5, logits, temperature=1.0) != draws(5, logits, temperature=1.0)


def test_draws_follow_the_probabilities_and_the_temperature() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    counts = torch.bincount(torch.tensor(draws(4000, logits, temperature=1.0, seed=0)), minlength=3) / 4000
    assert counts.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    counts = torch.bincount(torch.tensor(draws(4000, logits, temperature=0.5, seed=0)), minlength=3) / 4000
    assert counts.tolist() == pytest.approx([0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38], abs=0.03)


@given(st.floats(0, 1e-3))
def test_a_temperature_next_to_nothing_takes_the_likeliest_token(temperature: float) -> None:
    sampler = Sampler(SamplingSettings(max_tokens=1, temperature=temperature, seed=0))
    assert sampler.greedy or sampler.draw(torch.tensor([-30.0, 40.0, 39.0, -torch.inf])) == 1


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, {0}), (0.5, {0}), (0.6, {0, 1}), (0.85, {0, 1, 2})])
def test_top_p_draws_among_the_fewest_likeliest_that_reach_it(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draws(300, logits, temperature=1.0, top_p=top_p, seed=0)) == kept


def test_top_p_of_a_flat_distribution_keeps_its_share_of_a_large_vocabulary() -> None:
    drawn = draws(400, torch.zeros(4000), temperature=1.0, top_p=0.5, seed=0)
    assert 330 < len(set(drawn)) <= 400


def test_a_draw_from_what_is_no_number_raises() -> None:
    with pytest.raises(RuntimeError):
        draws(1, torch.full((8,), torch.nan), temperature=1.0)


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_strings_end_the_text_where_the_first_is_complete_however_it_is_cut(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    ends = [(at + len(s), at) for s in stop if (at := text.find(s)) >= 0]
    stops, shown, ended = StopStrings(stop), "", False
    for piece in pieces_of(text, cuts):
        part, ended = stops.feed(piece)
        shown += part
        assert text.startswith(shown)
        if ended:
            break
    if not ended:
        shown += stops.flush()
    expected = text[: min(ends)[1]] if ends else text
    assert (shown, ended) == (expected, bool(ends))
    assert not any(s in shown for s in stop)


def test_text_is_held_back_only_while_it_may_become_a_stop_string() -> None:
    stops = StopStrings(["\nUser:"])
    assert stops.feed("Hello\nUs") == ("Hello", False)
    assert stops.feed("ual") == ("\nUsual", False)
    assert stops.feed("\n") == ("", False)
    assert stops.flush() == "\n"


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def piece_tokenizer() -> Tokenizer:
    """A vocabulary in the manner of SentencePiece: ▁ for a space, <0xNN> for bytes, the first space dropped."""
    words = ["▁", "▁a", "▁the", "b", "é", "▁▁", "\ufffd", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    model = models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    return [*(decoder.feed(token) for token in tokens), decoder.flush()]


@given(st.lists(st.integers(0, 255), max_size=40))
def test_pieces_of_any_bytes_equal_the_whole(tokens: list[int]) -> None:
    tokenizer = byte_tokenizer()
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


@given(st.lists(st.sampled_from([BYTES.index(c) for c in "ðŁĮĬâ¬ÃÿaĠ"]), max_size=60))
def test_pieces_of_broken_characters_equal_the_whole(tokens: list[int]) -> None:
    tokenizer = byte_tokenizer()
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_a_long_run_of_broken_characters_is_not_decoded_from_its_start_each_time() -> None:
    tokenizer, decoded = byte_tokenizer(), []

    class Watched:
        def decode(self, tokens: list[int]) -> str:
            decoded.append(len(tokens))
            return str(tokenizer.decode(tokens))

    decoder = IncrementalDecoder(Watched())  # type: ignore[arg-type]
    broken = [BYTES.index("Į")] * 500
    assert "".join([*map(decoder.feed, broken), decoder.flush()]) == "\ufffd" * 500
    assert max(decoded) < 40


@given(st.text(max_size=20))
def test_pieces_of_text_are_whole_characters(text: str) -> None:
    tokenizer = byte_tokenizer()
    parts = pieces(tokenizer, tokenizer.encode(text).ids)
    assert "".join(parts) == text
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


#: Tokens of whole words, and characters as the tokens of their bytes; ByteFallback is only defined on valid UTF-8.
whole = st.one_of(
    st.integers(0, 6).map(lambda token: [token]),
    st.characters(codec="utf-8").map(lambda character: [8 + byte for byte in character.encode()]),
)


@given(st.lists(whole, max_size=20))
def test_pieces_of_a_vocabulary_with_leading_spaces_and_byte_tokens_equal_the_whole(parts: list[list[int]]) -> None:
    tokenizer, tokens = piece_tokenizer(), [token for part in parts for token in part]
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)
