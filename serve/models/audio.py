"""Sound files as models want them, mono at 16 kHz, decoded in blocks so that no claim of a file sizes the memory."""

from __future__ import annotations

import io
import wave
from collections.abc import Iterator
from typing import Any

import numpy as np

from serve.errors import InvalidInput, PayloadTooLarge, UnsupportedMedia

#: Samples a second of what `decode` returns.
RATE = 16_000

FORMATS = "WAV, FLAC, OGG or MP3"

#: First bytes of the formats; others that the decoder knows are seldom sent and seldom tested.
_MAGIC = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3")

_RATES = range(1_000, 384_001)
_MOST_CHANNELS = 32
_BLOCK_FRAMES = 65_536

#: Floating-point samples lie between -1 and 1; a mix may exceed that a little, integers stored as floats do by far.
_LOUDEST = 16.0


def decode(content: Any, *, max_audio_s: float) -> np.ndarray:
    """Return a sound file as float32 [samples] at 16 kHz, its channels averaged.

    Args:
        content: The bytes of a WAV, FLAC, OGG or MP3 file.
        max_audio_s: Longest sound, seconds; decoding stops there whatever the file claims.

    Raises:
        InvalidInput: The file is damaged, cut short or holds no sound (`UnsupportedMedia`: it is no sound file;
            `PayloadTooLarge`: it lasts too long).
    """
    import soundfile

    if not isinstance(content, bytes) or not content:
        found = "it is empty" if content == b"" else f"a value of type {type(content).__name__} was found"
        raise InvalidInput(f"the bytes of a sound file are wanted; {found}", place="audio")
    _check_format(content)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            _check_header(file)
            samples = np.concatenate([np.empty(0, np.float32), *_resampled(file, max_audio_s=max_audio_s)])
            if _knows_its_length(content):
                _check_whole(file)
    except soundfile.LibsndfileError as error:
        raise InvalidInput(f"the sound file is damaged: {error.error_string}", place="audio") from error
    if not len(samples):
        raise InvalidInput("the sound file holds no samples", place="audio")
    return samples


def example_recording() -> bytes:
    """Return a tenth of a second of a rising tone, as a small WAV file."""
    phase = np.cumsum(np.linspace(200, 1_000, 800)) * 2 * np.pi / 8_000
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(8_000)
        file.writeframes((128 + 60 * np.sin(phase)).astype(np.uint8).tobytes())
    return buffer.getvalue()


def _check_format(content: bytes) -> None:
    mpeg_frame = content[0] == 0xFF and len(content) > 1 and content[1] & 0xE0 == 0xE0
    if not content.startswith(_MAGIC) and not mpeg_frame:
        message = f"a sound file ({FORMATS}) is wanted; the {len(content)} bytes begin with {content[:12]!r}"
        raise UnsupportedMedia(message, place="audio")
    if content.startswith(b"RIFF"):
        _check_riff(content)
    if content.startswith(b"OggS"):
        _check_ogg(content)


def _check_riff(content: bytes) -> None:
    """Refuse a WAV that is shorter than it says, which the decoder would play as far as it goes."""
    declared = int.from_bytes(content[4:8], "little") + 8
    streamed = declared >= 2**31 or declared == 8  # a writer that cannot seek back leaves such a length
    if not streamed and len(content) < declared - 1:
        raise InvalidInput(
            f"the sound file is cut short: its header says {declared} bytes and it has {len(content)}", place="audio"
        )


def _check_ogg(content: bytes) -> None:
    """Refuse an Ogg file without the whole page that ends its stream (RFC 3533, section 6)."""
    page = content[content.rfind(b"OggS") :]
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
    if not segments or not page[5] & 4 or len(page) < 27 + len(segments) + sum(segments):
        raise InvalidInput("the sound file is cut short: the page that ends an Ogg stream is missing", place="audio")


def _knows_its_length(content: bytes) -> bool:
    """Tell whether the file says how long it is; MP3 does in an optional first frame, and is guessed otherwise."""
    if content.startswith((b"RIFF", b"RF64", b"OggS", b"fLaC")):
        return True
    start = 0
    if content.startswith(b"ID3"):  # its length is four times seven bits
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(content[6:10], (21, 14, 7, 0), strict=False))
    frame = content[start : start + 64]
    return b"Xing" in frame or b"Info" in frame


def _check_header(file: Any) -> None:
    if file.samplerate not in _RATES:
        raise InvalidInput(
            f"the sound file has {file.samplerate} samples a second; {_RATES[0]} to {_RATES[-1]} are read",
            place="audio",
        )
    if file.channels > _MOST_CHANNELS:
        raise InvalidInput(f"the sound file has {file.channels} channels; {_MOST_CHANNELS} are the most", place="audio")


def _check_whole(file: Any) -> None:
    read = file.tell()
    if read < file.frames:
        raise InvalidInput(
            f"the sound file is cut short: its header says {file.frames} frames and {read} were read", place="audio"
        )


def _resampled(file: Any, *, max_audio_s: float) -> Iterator[np.ndarray]:
    import soxr

    stream = None if file.samplerate == RATE else soxr.ResampleStream(file.samplerate, RATE, 1, dtype="float32")
    for block in _mono_blocks(file, max_audio_s=max_audio_s):
        yield block if stream is None else stream.resample_chunk(block)
    if stream is not None:
        yield stream.resample_chunk(np.empty(0, np.float32), last=True)


def _mono_blocks(file: Any, *, max_audio_s: float) -> Iterator[np.ndarray]:
    frames, most = 0, int(max_audio_s * file.samplerate)
    buffer = np.empty((_BLOCK_FRAMES, file.channels), np.float32)
    while len(block := file.read(out=buffer)):
        if frames + len(block) > most:
            raise PayloadTooLarge(f"the sound lasts more than the {max_audio_s:g} s that are taken", place="audio")
        mono = block.mean(axis=1)
        _check_samples(mono, first=frames)
        frames += len(block)
        yield mono


def _check_samples(samples: np.ndarray, *, first: int) -> None:
    fitting = np.abs(samples) <= _LOUDEST  # false for NaN, too
    if not fitting.all():
        place = int(fitting.argmin())
        raise InvalidInput(f"sample {first + place} is {samples[place]}; samples lie between -1 and 1", place="audio")
