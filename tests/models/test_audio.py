"""Sound files become samples, and those that are damaged, too long or none are refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from serve.errors import InvalidInput, PayloadTooLarge, UnsupportedMedia
from serve.models.audio import RATE, decode, example_recording

SPEECH = (Path(__file__).parents[1] / "data" / "speech.flac").read_bytes()
FORMATS = ["WAV", "FLAC", "OGG", "MP3"]


def tone(seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * 440 / rate)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def test_a_recording_at_another_rate_is_resampled_as_a_whole_would_be() -> None:
    samples, rate = soundfile.read(io.BytesIO(SPEECH), dtype="float32")
    found = decode(SPEECH, max_audio_s=60)
    assert (rate, found.dtype, found.ndim) == (22_050, np.float32, 1)
    np.testing.assert_allclose(found, soxr.resample(samples, rate, RATE), atol=1e-6)


def test_a_sound_of_many_blocks_is_resampled_without_seams() -> None:
    samples = tone(20, 44_100)
    found = decode(encoded(samples, 44_100, subtype="FLOAT"), max_audio_s=60)
    np.testing.assert_allclose(found, soxr.resample(samples, 44_100, RATE), atol=1e-6)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read(kind: str) -> None:
    found = decode(encoded(tone(), kind=kind), max_audio_s=60)
    assert abs(len(found) - RATE / 2) <= RATE / 100
    assert np.abs(found[1000:7000] - tone()[1000:7000]).max() < 0.05


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
def test_every_sample_type_has_the_same_scale(subtype: str) -> None:
    np.testing.assert_allclose(decode(encoded(tone(), subtype=subtype), max_audio_s=60), tone(), atol=0.02)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_averaged(channels: int) -> None:
    left = np.zeros((8000, channels), np.float32)
    left[:, 0] = 0.5
    np.testing.assert_allclose(decode(encoded(left), max_audio_s=60), 0.5 / channels, atol=1e-4)


def test_the_example_is_a_small_sound_file() -> None:
    assert len(example_recording()) < 1_000
    assert len(decode(example_recording(), max_audio_s=1)) == RATE // 10


@pytest.mark.parametrize("kind", FORMATS)
def test_a_sound_that_lasts_too_long_is_refused(kind: str) -> None:
    content = encoded(tone(2.0), kind=kind)
    assert len(decode(content, max_audio_s=2.1)) > 0
    with pytest.raises(PayloadTooLarge, match=r"audio: the sound lasts more than the 1\.5 s that are taken"):
        decode(content, max_audio_s=1.5)


def test_a_small_file_of_many_hours_is_refused() -> None:
    silence = encoded(np.zeros(RATE * 900, np.int16), kind="FLAC")
    assert len(silence) < 400_000
    with pytest.raises(PayloadTooLarge):
        decode(silence, max_audio_s=600)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_file_cut_short_is_invalid(kind: str, share: float) -> None:
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 4 * RATE).astype(np.float32)
    content = encoded(noise, kind=kind)
    with pytest.raises(InvalidInput) as caught:
        decode(content[: int(len(content) * share)], max_audio_s=60)
    assert caught.value.place == "audio"


@pytest.mark.parametrize("length", [0, 0xFFFFFFFF])
def test_a_wav_that_was_streamed_is_read_as_far_as_it_goes(length: int) -> None:
    content = bytearray(encoded(tone()))
    content[4:8] = length.to_bytes(4, "little")
    assert len(decode(bytes(content), max_audio_s=60)) == RATE // 2


def test_an_mp3_that_does_not_say_its_length_is_read() -> None:
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 2 * RATE).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.concatenate([tone(4.0) * 0, noise]), RATE, format="MP3", bitrate_mode="VARIABLE")
    content = buffer.getvalue()
    headless = content[content.index(content[:2], 4) :]
    assert b"Xing" not in headless
    assert len(decode(headless, max_audio_s=60)) > 5.9 * RATE


@pytest.mark.parametrize(
    "content", [b"hello, this is text", b"%PDF-1.7 and more", b"\x00\x01", b"\x1aE\xdf\xa3webm", b"{}"]
)
def test_what_is_no_sound_file_is_unsupported_and_named(content: bytes) -> None:
    with pytest.raises(UnsupportedMedia) as caught:
        decode(content, max_audio_s=60)
    assert caught.value.place == "audio"
    assert f"a sound file (WAV, FLAC, OGG or MP3) is wanted; the {len(content)} bytes begin with" in str(caught.value)
    assert repr(content[:12]) in str(caught.value)


@pytest.mark.parametrize("content", [b"", None, 7, "RIFF", ["a"]])
def test_what_is_no_bytes_is_invalid(content: Any) -> None:
    with pytest.raises(InvalidInput, match="audio: the bytes of a sound file are wanted"):
        decode(content, max_audio_s=60)


@pytest.mark.parametrize("content", [b"RIFF", b"RIFF\x00\x00\x00\x00WAVE", b"fLaC", b"OggS", b"ID3", b"\xff\xfb"])
def test_a_header_alone_is_invalid(content: bytes) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode(content, max_audio_s=60)
    assert caught.value.place == "audio"


def test_a_file_without_samples_is_invalid() -> None:
    with pytest.raises(InvalidInput, match="holds no samples"):
        decode(encoded(np.empty(0, np.float32)), max_audio_s=60)


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf"), (32767.0, "32767")])
def test_samples_out_of_range_are_invalid_and_placed(value: float, shown: str) -> None:
    samples = tone()
    samples[[1234, 2000]] = value
    with pytest.raises(InvalidInput, match=rf"sample 1234 is {shown}.*; samples lie between -1 and 1"):
        decode(encoded(samples, subtype="FLOAT"), max_audio_s=60)


def test_an_absurd_rate_is_invalid() -> None:
    content = bytearray(encoded(tone()))
    content[24:28] = (7).to_bytes(4, "little")
    with pytest.raises(InvalidInput, match="7 samples a second"):
        decode(bytes(content), max_audio_s=60)


@pytest.mark.parametrize("kind", FORMATS)
def test_damage_never_raises_anything_but_invalid_input(kind: str) -> None:
    whole = encoded(tone(0.3), kind=kind)
    generator = np.random.default_rng(0)
    for _ in range(100):
        damaged = np.frombuffer(whole, np.uint8).copy()
        places = generator.integers(0, min(len(damaged), 600), 8)
        damaged[places] = generator.integers(0, 256, 8)
        try:
            decode(damaged.tobytes(), max_audio_s=60)
        except InvalidInput as error:
            assert error.place == "audio"
