"""Where in a recording somebody speaks, with Silero VAD in numpy: torch would take longer to import than to compute."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serve.cache import build_once
from serve.errors import LoadError
from serve.models import audio
from serve.models.base import Item, LoadContext, Signature, TensorSpec
from serve.models.devices import use_numpy_threads
from serve.spec import VoiceActivityOptions

_WINDOW = 512
_CONTEXT = 64
_REFLECTED = 64
_FFT = 256
_HOP = 128
_BINS = _FFT // 2 + 1
_UNITS = 128

#: Windows whose features are computed together; they fit a core's cache.
_TOGETHER = 128

#: Speech ends where the probability falls this far below the threshold, and stays there.
_HYSTERESIS = 0.15
_LOWEST_END = 0.01
_LEAST_SPEECH = audio.RATE * 250 // 1000
_LEAST_SILENCE = audio.RATE * 100 // 1000
_PAD = audio.RATE * 30 // 1000

_SHAPES = {
    "stft.forward_basis_buffer": (2 * _BINS, 1, _FFT),
    "encoder.0.reparam_conv.weight": (128, _BINS, 3),
    "encoder.0.reparam_conv.bias": (128,),
    "encoder.1.reparam_conv.weight": (64, 128, 3),
    "encoder.1.reparam_conv.bias": (64,),
    "encoder.2.reparam_conv.weight": (64, 64, 3),
    "encoder.2.reparam_conv.bias": (64,),
    "encoder.3.reparam_conv.weight": (_UNITS, 64, 3),
    "encoder.3.reparam_conv.bias": (_UNITS,),
    "decoder.rnn.weight_ih": (4 * _UNITS, _UNITS),
    "decoder.rnn.weight_hh": (4 * _UNITS, _UNITS),
    "decoder.rnn.bias_ih": (4 * _UNITS,),
    "decoder.rnn.bias_hh": (4 * _UNITS,),
    "decoder.decoder.2.weight": (1, _UNITS, 1),
    "decoder.decoder.2.bias": (1,),
}

#: Strides of the encoder's convolutions, in order.
_STRIDES = (1, 2, 2, 1)


class VoiceActivity:
    """A `Model`: `audio` BYTES [-1] -> `segments` BYTES [-1] and `speech_ratio` FP32 [-1]."""

    signature: Signature

    def load(self, context: LoadContext) -> None:
        """Load the file that the source names, or silero_vad.jit of its folder (or of `data` there), converted once.

        Raises:
            LoadError: The file is absent, damaged or another network's, or the device is a GPU.
        """
        if context.device != "cpu":
            raise LoadError("voice-activity computes on the CPU; set resources.gpus to 0 and leave device out")
        self._options: VoiceActivityOptions = context.options
        use_numpy_threads(context.threads)
        context.progress("weights", 0, 1)
        self._network = SileroVad(_read_weights(context.file or _weights_file(context.folder), context.cache_dir))
        self.signature = _signature(self._options)
        context.progress("weights", 1, 1)

    def prepare(self, item: Item) -> np.ndarray:
        """Return the sound, float32 [samples] at 16 kHz.

        Raises:
            InvalidInput: The sound file is not usable; see `serve.models.audio.decode`.
        """
        return audio.decode(item["audio"], max_audio_s=self._options.max_audio_s)

    def predict(self, batch: Sequence[np.ndarray]) -> list[Mapping[str, Any]]:
        """Return `segments` (JSON text) and `speech_ratio` (float32) of each recording."""
        rows: list[Mapping[str, Any]] = []
        for samples, probabilities in zip(batch, self._network(batch), strict=True):
            found = segments(probabilities, samples=len(samples), threshold=self._options.threshold)
            spoken = sum(end - start for start, end in found)
            seconds = [[round(start / audio.RATE, 3), round(end / audio.RATE, 3)] for start, end in found]
            rows.append({"segments": json.dumps(seconds), "speech_ratio": np.float32(spoken / len(samples))})
        return rows


class SileroVad:
    """The network for 16 kHz: of each window of 512 samples (32 ms), the probability that somebody speaks in it.

    Source: Silero Team, "Silero VAD", version 5 and later, whose published network it computes.

    Args:
        weights: Tensors under the names of the published network, float32.
    """

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        self._spectrum = np.ascontiguousarray(weights["stft.forward_basis_buffer"][:, 0].T)
        self._convolutions = [
            (_matrix(weights[f"encoder.{n}.reparam_conv.weight"]), weights[f"encoder.{n}.reparam_conv.bias"], stride)
            for n, stride in enumerate(_STRIDES)
        ]
        self._inputs = np.ascontiguousarray(weights["decoder.rnn.weight_ih"].T)
        self._recurrent = np.ascontiguousarray(weights["decoder.rnn.weight_hh"].T)
        self._gate_bias = weights["decoder.rnn.bias_ih"] + weights["decoder.rnn.bias_hh"]
        self._output = weights["decoder.decoder.2.weight"][0, :, 0]
        self._output_bias = weights["decoder.decoder.2.bias"][0]

    def __call__(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return float32 [windows] of each recording, float32 [samples] at 16 kHz; zeros fill the last window."""
        windows = [_windows(samples) for samples in recordings]
        counts = [len(part) for part in windows]
        together = np.concatenate(windows)
        gates = np.concatenate(
            [self._gates(together[start : start + _TOGETHER]) for start in range(0, len(together), _TOGETHER)]
        )
        return self._recur(np.split(gates, np.cumsum(counts)[:-1]))

    def _gates(self, windows: np.ndarray) -> np.ndarray:
        """Return what each window (with context, [N, 640]) adds to the recurrent gates, [N, 512]: all but the state."""
        frames = np.lib.stride_tricks.sliding_window_view(windows, _FFT, axis=1)[:, ::_HOP]
        spectrum = _matmul(frames, self._spectrum)
        x = np.sqrt(np.square(spectrum[..., :_BINS]) + np.square(spectrum[..., _BINS:]))
        for matrix, bias, stride in self._convolutions:
            x = _convolve(x, matrix, bias, stride=stride)
        gates: np.ndarray = x[:, 0] @ self._inputs + self._gate_bias
        return gates

    def _recur(self, gates: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run the recordings through the recurrent cell together, the longest first, so that they end in turn."""
        order = sorted(range(len(gates)), key=lambda index: -len(gates[index]))
        lengths = np.array([len(gates[index]) for index in order])
        hidden = np.zeros((len(gates), _UNITS), np.float32)
        cell = np.zeros_like(hidden)
        states = np.zeros((lengths[0], len(gates), _UNITS), np.float32)
        for step in range(lengths[0]):
            running = int(np.searchsorted(-lengths, -step))
            added = np.stack([gates[index][step] for index in order[:running]])
            added += hidden[:running] @ self._recurrent
            enter, forget, out = (_sigmoid(added[:, part * _UNITS : (part + 1) * _UNITS]) for part in (0, 1, 3))
            cell[:running] = forget * cell[:running] + enter * np.tanh(added[:, 2 * _UNITS : 3 * _UNITS])
            hidden[:running] = out * np.tanh(cell[:running])
            states[step, :running] = hidden[:running]
        spoken = _sigmoid(np.maximum(states, 0.0) @ self._output + self._output_bias)
        rank = {index: position for position, index in enumerate(order)}
        return [spoken[: len(part), rank[index]] for index, part in enumerate(gates)]


def segments(probabilities: np.ndarray, *, samples: int, threshold: float) -> list[tuple[int, int]]:
    """Return where somebody speaks, as (start, end) in samples at 16 kHz, in order and apart from each other.

    Speech starts at a window that reaches the threshold and ends at the first of 100 ms of windows well below it; what
    lasts 250 ms or less is dropped, and what remains is widened by 30 ms, or half the silence between two.

    Args:
        probabilities: Of each window of 512 samples.
        samples: Length of the recording.
        threshold: Probability that counts as speech.
    """
    return _widened(_spoken(probabilities, samples=samples, threshold=threshold), samples=samples)


def _spoken(probabilities: np.ndarray, *, samples: int, threshold: float) -> list[tuple[int, int]]:
    lower = max(threshold - _HYSTERESIS, _LOWEST_END)
    found: list[tuple[int, int]] = []
    start: int | None = None
    end: int | None = None
    for index, probability in enumerate(probabilities.tolist()):
        now = index * _WINDOW
        if probability >= threshold:
            start, end = now if start is None else start, None
        elif probability < lower and start is not None:
            end = now if end is None else end
            if now - end >= _LEAST_SILENCE:
                found.append((start, end))
                start = end = None
    if start is not None:
        found.append((start, samples))
    return [(start, end) for start, end in found if end - start > _LEAST_SPEECH]


def _widened(found: Sequence[tuple[int, int]], *, samples: int) -> list[tuple[int, int]]:
    starts = [start for start, _ in found]
    ends = [end for _, end in found]
    for index in range(len(found) - 1):
        reach = min(_PAD, (starts[index + 1] - ends[index]) // 2)
        ends[index] += reach
        starts[index + 1] -= reach
    if found:
        starts[0] = max(0, starts[0] - _PAD)
        ends[-1] = min(samples, ends[-1] + _PAD)
    return list(zip(starts, ends, strict=True))


def _windows(samples: np.ndarray) -> np.ndarray:
    """Return each window after the 64 samples before it and before the mirror of its last 64: [windows, 640]."""
    count = -(-len(samples) // _WINDOW)
    padded = np.pad(samples, (_CONTEXT, count * _WINDOW - len(samples)))
    seen = np.lib.stride_tricks.sliding_window_view(padded, _CONTEXT + _WINDOW)[::_WINDOW]
    windows: np.ndarray = np.pad(seen, ((0, 0), (0, _REFLECTED)), mode="reflect")
    return windows


def _matrix(weight: np.ndarray) -> np.ndarray:
    """Turn a convolution of width 3, [out, in, 3], into a matrix [in * 3, out]."""
    return np.ascontiguousarray(weight.reshape(len(weight), -1).T)


def _convolve(x: np.ndarray, matrix: np.ndarray, bias: np.ndarray, *, stride: int) -> np.ndarray:
    """Convolve [N, time, in] with a kernel of width 3 and a border of zeros, then clip below zero: [N, time', out]."""
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    taps = np.lib.stride_tricks.sliding_window_view(padded, 3, axis=1)[:, ::stride]
    clipped: np.ndarray = np.maximum(_matmul(taps.reshape(*taps.shape[:2], -1), matrix) + bias, 0.0)
    return clipped


def _matmul(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Multiply [N, time, in] by [in, out] as one matrix: numpy would multiply once for each N."""
    product: np.ndarray = x.reshape(-1, len(matrix)) @ matrix
    return product.reshape(*x.shape[:2], -1)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def _weights_file(folder: Path) -> Path:
    for candidate in (folder, folder / "data"):
        path = candidate / "silero_vad.jit"
        if path.is_file():
            return path
    raise LoadError(f"{folder} holds no silero_vad.jit, nor does its folder data")


def _read_weights(path: Path, cache_dir: Path) -> dict[str, np.ndarray]:
    """Read the tensors of the published program, which torch converts once; later loads do without torch."""
    from safetensors.numpy import load_file

    def convert(folder: Path) -> None:
        _convert(path, folder / "model.safetensors")

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    weights: dict[str, np.ndarray] = load_file(
        build_once(cache_dir, f"converted/{digest}", convert) / "model.safetensors"
    )
    return weights


def _convert(source: Path, target: Path) -> None:
    """Write the 16 kHz network's tensors of a TorchScript file as safetensors.

    Raises:
        LoadError: The file is damaged or another network's.
    """
    import torch
    from safetensors.torch import save_file

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the format of the published file is an old one
            network: Any = torch.jit.load(  # type: ignore[no-untyped-call]
                source, map_location="cpu"
            )
        state = network._model.state_dict()
    except (RuntimeError, AttributeError, ValueError) as error:
        raise LoadError(f"{source} is not Silero VAD: {str(error).splitlines()[0]}") from error
    for name, shape in _SHAPES.items():
        if name not in state or tuple(state[name].shape) != shape:
            found = f"of shape {tuple(state[name].shape)}" if name in state else "absent"
            raise LoadError(f"{source} is not Silero VAD, version 5 or later: {name} is {found}, not {shape}")
    save_file({name: state[name].contiguous() for name in _SHAPES}, target)


def _signature(options: VoiceActivityOptions) -> Signature:
    return Signature(
        inputs=(
            TensorSpec(
                "audio",
                "BYTES",
                (-1,),
                f"Sound of at most {options.max_audio_s:g} s as the bytes of a {audio.FORMATS} file.",
                content="base64",
            ),
        ),
        outputs=(
            TensorSpec("segments", "BYTES", (-1,), "Where somebody speaks: JSON, [[start, end], ...] in seconds."),
            TensorSpec("speech_ratio", "FP32", (-1,), "Share of the recording in which somebody speaks, 0 to 1."),
        ),
        example={"audio": audio.example_recording()},
    )
