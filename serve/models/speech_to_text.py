"""Speech to text with Whisper on CTranslate2, its features computed by numpy so that a replica needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
from tokenizers import Tokenizer

from serve.errors import InvalidInput, LoadError, UnsupportedParameter
from serve.models import audio
from serve.models.base import Item, LoadContext, Signature, TensorSpec
from serve.models.devices import use_numpy_threads
from serve.spec import SpeechOptions

_WINDOW_S = 30
_SAMPLES = _WINDOW_S * audio.RATE
_FFT = 400
_HOP = 160
_FRAMES = _SAMPLES // _HOP

#: A longer recording is cut where it is quietest within the last seconds of a window, which is seldom inside a word.
_SEARCH_S = 5.0
_QUIET_S = 0.3

#: Windows computed together; those of one long recording must not claim the memory of all at once.
_TOGETHER = 8

#: Tokens of one window: half of the decoder's positions, as Whisper's authors bound it.
_MOST_TOKENS = 224

#: A window that probably holds no speech gives no text, unless the text's mean log-probability speaks for it. Whisper's
#: authors set that to -1, with which silence is heard as "you".
_NO_SPEECH = 0.6
_UNLIKELY = -0.5


@dataclass(frozen=True, slots=True)
class Recording:
    """What `prepare` makes of an item.

    Args:
        windows: Log-mel features of each window of 30 s, float32 [mels, 3000].
        duration_s: How long the sound is, seconds.
        prompt: The tokens that tell the decoder its task.
    """

    windows: tuple[np.ndarray, ...]
    duration_s: float
    prompt: tuple[int, ...]


class SpeechToText:
    """A `Model`: `audio` BYTES [-1] -> `text` BYTES [-1] and `duration_s` FP32 [-1]."""

    signature: Signature

    def load(self, context: LoadContext) -> None:
        """Load model.bin, config.json, the vocabulary and tokenizer.json of `context.folder` (or its folder `model`).

        Raises:
            LoadError: A file is absent or damaged, or the model does not know the language of the options.
        """
        self._options: SpeechOptions = context.options
        use_numpy_threads(context.threads)
        context.progress("weights", 0, 1)
        folder = _model_folder(context.folder)
        self._model = _load_model(folder, context)
        self._tokenizer = _load_tokenizer(folder)
        self._mels = int(self._model.n_mels)
        try:
            self._prompt(self._options.language)
        except InvalidInput as error:
            raise LoadError(f"options.language: {error.message}") from error
        self.signature = _signature(self._options)
        context.progress("weights", 1, 1)

    def prepare(self, item: Item) -> Recording:
        """Decode the sound and compute its features.

        Raises:
            InvalidInput: The sound file is not usable (see `serve.models.audio.decode`), or the parameter `language`
                names a language that the model does not know.
        """
        language = item.get("parameters", {}).get("language", self._options.language)
        prompt = self._prompt(language)
        samples = audio.decode(item["audio"], max_audio_s=self._options.max_audio_s)
        windows = tuple(log_mel(part, mels=self._mels) for part in split(samples))
        return Recording(windows, len(samples) / audio.RATE, prompt)

    def predict(self, batch: Sequence[Recording]) -> list[Mapping[str, Any]]:
        """Return `text` (str) and `duration_s` (float32) of each recording."""
        windows = [(features, recording.prompt) for recording in batch for features in recording.windows]
        texts: list[str] = []
        for start in range(0, len(windows), _TOGETHER):
            texts += self._transcribe(windows[start : start + _TOGETHER])
        rows: list[Mapping[str, Any]] = []
        rest = iter(texts)
        for recording in batch:
            parts = [next(rest) for _ in recording.windows]
            text = " ".join(part for part in parts if part)
            rows.append({"text": text, "duration_s": np.float32(recording.duration_s)})
        return rows

    def _transcribe(self, windows: Sequence[tuple[np.ndarray, tuple[int, ...]]]) -> list[str]:
        results = self._model.generate(
            ctranslate2.StorageView.from_array(np.stack([features for features, _ in windows])),
            [list(prompt) for _, prompt in windows],
            beam_size=self._options.beam_size,
            max_length=_MOST_TOKENS + len(windows[0][1]),
            return_scores=True,
            return_no_speech_prob=True,
        )
        return [self._text(result) for result in results]

    def _text(self, result: Any) -> str:
        if result.no_speech_prob > _NO_SPEECH and result.scores[0] < _UNLIKELY:
            return ""
        text: str = self._tokenizer.decode(result.sequences_ids[0], skip_special_tokens=True)
        return text.strip()

    def _prompt(self, language: Any) -> tuple[int, ...]:
        """Return start, language, task and no timestamps; a model of English alone knows neither language nor task."""
        if not isinstance(language, str):
            raise InvalidInput(f"{language!r} is no ISO 639-1 code", place="parameters.language")
        if not self._model.is_multilingual:
            if language != "en":
                message = f"{language!r} is not supported; this model knows English (en) alone"
                raise UnsupportedParameter(message, place="parameters.language")
            return self._tokens("<|startoftranscript|>", "<|notimestamps|>")
        if self._tokenizer.token_to_id(f"<|{language}|>") is None or len(language) > 3:
            message = f"{language!r} is not a language that this model knows; it takes ISO 639-1 codes such as en or de"
            raise UnsupportedParameter(message, place="parameters.language")
        return self._tokens("<|startoftranscript|>", f"<|{language}|>", "<|transcribe|>", "<|notimestamps|>")

    def _tokens(self, *names: str) -> tuple[int, ...]:
        ids: list[int] = []
        for name in names:
            token = self._tokenizer.token_to_id(name)
            if token is None:
                raise LoadError(f"tokenizer.json has no token {name}; it is not Whisper's")
            ids.append(token)
        return tuple(ids)


def split(samples: np.ndarray) -> list[np.ndarray]:
    """Cut a recording (float32 [samples] at 16 kHz) into parts of at most 30 s, each cut at the quietest place near."""
    parts = []
    while len(samples) > _SAMPLES:
        cut = _quietest(samples[:_SAMPLES])
        parts.append(samples[:cut])
        samples = samples[cut:]
    return [*parts, samples]


def _quietest(window: np.ndarray) -> int:
    """Return the middle of the span of `_QUIET_S` with the least energy within the last `_SEARCH_S` of a window."""
    span, first = int(_QUIET_S * audio.RATE), len(window) - int(_SEARCH_S * audio.RATE)
    energy = np.concatenate([[0.0], np.cumsum(np.square(window[first:], dtype=np.float64))])
    return first + int(np.argmin(energy[span:] - energy[:-span])) + span // 2


def log_mel(samples: np.ndarray, *, mels: int) -> np.ndarray:
    """Return Whisper's features of at most 30 s of sound, padded with silence to 30 s: float32 [mels, 3000].

    Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022), section 2.2: the
    logarithm of a mel spectrogram of Hann windows of 25 ms every 10 ms, clipped to 8 decades below its peak.
    """
    padded = np.pad(np.pad(samples, (0, min(_FFT, _SAMPLES - len(samples)))), _FFT // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP][:_FRAMES]
    power = np.square(np.abs(np.fft.rfft(frames * _hann())))
    decades = np.log10(np.maximum(power @ mel_filters(mels), 1e-10))
    features = np.full((mels, _FRAMES), -10.0)
    features[:, : len(frames)] = decades.T
    clipped: np.ndarray = (np.maximum(features, features.max() - 8.0) + 4.0) / 4.0
    return clipped.astype(np.float32)


@cache
def _hann() -> np.ndarray:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)


@cache
def mel_filters(mels: int) -> np.ndarray:
    """Return triangles of unit area, evenly spaced on Slaney's mel scale from 0 to 8 kHz: float64 [201, mels].

    Source: Slaney, "Auditory Toolbox", version 2 (1998): linear below 1 kHz, logarithmic above.
    """
    edges = _hertz(np.linspace(0.0, _mel(audio.RATE / 2), mels + 2))
    bins = np.linspace(0.0, audio.RATE / 2, _FFT // 2 + 1)
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    filters: np.ndarray = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))
    return filters


_KNEE_HZ = 1000.0
_HZ_PER_MEL = 200.0 / 3.0
_KNEE_MEL = _KNEE_HZ / _HZ_PER_MEL
_MELS_PER_E = 27.0 / np.log(6.4)


def _mel(hertz: float) -> float:
    return float(_KNEE_MEL + np.log(hertz / _KNEE_HZ) * _MELS_PER_E)


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < _KNEE_MEL, mel * _HZ_PER_MEL, _KNEE_HZ * np.exp((mel - _KNEE_MEL) / _MELS_PER_E))


def _model_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "model"):
        if (candidate / "model.bin").is_file():
            return candidate
    raise LoadError(f"{folder} holds no model.bin, nor does its folder model; a Whisper converted to CTranslate2 does")


def _load_model(folder: Path, context: LoadContext) -> Any:
    try:
        return ctranslate2.models.Whisper(
            str(folder),
            device=context.device,
            compute_type=context.dtype,
            inter_threads=1,
            intra_threads=context.threads,
        )
    except (RuntimeError, ValueError) as error:
        raise LoadError(f"{folder} does not load as Whisper on {context.device} in {context.dtype}: {error}") from error


def _load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the bindings raise nothing narrower
        raise LoadError(f"{path} cannot be read: {error}") from error


def _signature(options: SpeechOptions) -> Signature:
    return Signature(
        inputs=(
            TensorSpec(
                "audio",
                "BYTES",
                (-1,),
                f"Speech of at most {options.max_audio_s:g} s as the bytes of a {audio.FORMATS} file.",
                content="base64",
            ),
        ),
        outputs=(
            TensorSpec("text", "BYTES", (-1,), "The words that are spoken."),
            TensorSpec("duration_s", "FP32", (-1,), "How long the sound is, seconds."),
        ),
        parameters={"language": f"Language of the speech, an ISO 639-1 code; {options.language} where it is left out."},
        example={"audio": audio.example_recording()},
    )
