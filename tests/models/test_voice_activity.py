"""Speech is found where it is, with the published network's numbers."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from silero_vad import get_speech_timestamps, get_speech_timestamps_from_probs, load_silero_vad

from serve.errors import InvalidInput, LoadError, PayloadTooLarge, UnsupportedMedia
from serve.models import audio
from serve.models.base import LoadContext, Model
from serve.models.voice_activity import VoiceActivity, segments
from serve.spec import VoiceActivityOptions

SPEECH = (Path(__file__).parents[1] / "data" / "speech.flac").read_bytes()


def packaged() -> Path:
    spec = find_spec("silero_vad")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def context(folder: Path, cache_dir: Path, **options: Any) -> LoadContext:
    return LoadContext(
        folder=folder,
        options=VoiceActivityOptions(**options),
        device="cpu",
        dtype="float32",
        threads=1,
        max_batch_size=8,
        cache_dir=cache_dir,
        progress=lambda what, done, total: None,
    )


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(cache_dir: Path) -> VoiceActivity:
    model = VoiceActivity()
    model.load(context(packaged(), cache_dir, max_audio_s=60.0))
    return model


@pytest.fixture(scope="module")
def bare() -> Any:
    return load_silero_vad()


def recording(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, audio.RATE, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def speech() -> np.ndarray:
    return audio.decode(SPEECH, max_audio_s=60)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(int(seconds * audio.RATE), np.float32)


def noise(seconds: float, level: float = 0.05) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.uniform(-level, level, int(seconds * audio.RATE)).astype(np.float32)


def sounds() -> list[np.ndarray]:
    return [
        speech(),
        np.concatenate([silence(1), speech(), silence(2), speech(), silence(0.5)]),
        silence(1.5),
        noise(2),
        speech()[:20_000] + noise(1.25),
        speech()[:100],
    ]


def test_it_is_a_model(model: VoiceActivity) -> None:
    assert isinstance(model, Model)


def test_speech_is_found_where_it_is(model: VoiceActivity) -> None:
    samples = np.concatenate([silence(2), speech(), silence(3)])
    (answer,) = model.predict([model.prepare({"audio": recording(samples)})])
    found = json.loads(answer["segments"])
    assert found[0][0] == pytest.approx(2, abs=0.2)
    assert found[-1][1] == pytest.approx(2 + 4.26, abs=0.4)
    assert answer["speech_ratio"] == pytest.approx(sum(end - start for start, end in found) / (4.26 + 5), abs=1e-3)
    assert answer["speech_ratio"].dtype == np.float32


@pytest.mark.parametrize("samples", [silence(2), noise(2)], ids=["silence", "noise"])
def test_no_speech_is_found_where_none_is(model: VoiceActivity, samples: np.ndarray) -> None:
    (answer,) = model.predict([model.prepare({"audio": recording(samples)})])
    assert json.loads(answer["segments"]) == []
    assert answer["speech_ratio"] == 0.0


def test_a_batch_gives_the_segments_of_the_bare_model(model: VoiceActivity, bare: Any) -> None:
    expected = [
        [(s["start"] / audio.RATE, s["end"] / audio.RATE) for s in get_speech_timestamps(torch.from_numpy(x), bare)]
        for x in sounds()
    ]
    answers = model.predict([model.prepare({"audio": recording(samples)}) for samples in sounds()])
    assert [len(found) for found in expected] == [2, 4, 0, 0, 1, 0]
    for answer, found in zip(answers, expected, strict=True):
        np.testing.assert_allclose(json.loads(answer["segments"]), found, atol=6e-4)


def test_a_recording_is_answered_alike_alone_and_in_a_batch(model: VoiceActivity) -> None:
    prepared = [model.prepare({"audio": recording(samples)}) for samples in sounds()]
    together = model.predict(prepared)
    assert [answer["segments"] for answer in together] == [
        model.predict([samples])[0]["segments"] for samples in prepared
    ]


def test_probabilities_equal_those_of_the_bare_model(model: VoiceActivity, cache_dir: Path, bare: Any) -> None:
    from safetensors.numpy import load_file

    from serve.models.voice_activity import SileroVad

    (weights,) = cache_dir.rglob("*.safetensors")
    found = SileroVad(load_file(weights))(sounds())
    for samples, probabilities in zip(sounds(), found, strict=True):
        whole = np.pad(samples, (0, max(0, 512 - len(samples))))
        expected = bare.audio_forward(torch.from_numpy(whole)[None], audio.RATE)[0]
        np.testing.assert_allclose(probabilities, expected.numpy(), atol=1e-4)


PROBABILITIES = st.lists(st.sampled_from([0.0, 0.2, 0.4, 0.49, 0.5, 0.8, 1.0]), min_size=1, max_size=120)


@given(PROBABILITIES, st.integers(0, 511), st.sampled_from([0.1, 0.5, 0.8]))
def test_segments_equal_those_of_the_package(probabilities: list[float], missing: int, threshold: float) -> None:
    samples = len(probabilities) * 512 - missing
    package = get_speech_timestamps_from_probs(probabilities, threshold=threshold, audio_length_samples=samples)
    found = segments(np.array(probabilities), samples=samples, threshold=threshold)
    # The package halves an odd silence between two segments into halves that may differ by one sample.
    assert np.abs(np.array(found) - np.array([(s["start"], s["end"]) for s in package])).max(initial=0) <= 1
    assert len(found) == len(package)


@given(PROBABILITIES)
def test_segments_are_in_order_apart_and_inside(probabilities: list[float]) -> None:
    samples = len(probabilities) * 512
    edges = [edge for segment in segments(np.array(probabilities), samples=samples, threshold=0.5) for edge in segment]
    assert edges == sorted(edges)
    assert not edges or (edges[0] >= 0 and edges[-1] <= samples)


def test_the_signature_describes_the_answer_and_its_example_is_answered(model: VoiceActivity) -> None:
    (sound,) = model.signature.inputs
    assert (sound.name, sound.datatype, sound.shape, sound.content) == ("audio", "BYTES", (-1,), "base64")
    assert [(t.name, t.datatype, t.shape) for t in model.signature.outputs] == [
        ("segments", "BYTES", (-1,)),
        ("speech_ratio", "FP32", (-1,)),
    ]
    assert model.signature.example is not None
    (answer,) = model.predict([model.prepare(model.signature.example)])
    assert answer.keys() == {"segments", "speech_ratio"}


def test_a_lower_threshold_finds_at_least_as_much(model: VoiceActivity, cache_dir: Path) -> None:
    ratios = []
    for threshold in (0.05, 0.5, 0.95):
        other = VoiceActivity()
        other.load(context(packaged(), cache_dir, threshold=threshold))
        (answer,) = other.predict([other.prepare({"audio": SPEECH})])
        ratios.append(float(answer["speech_ratio"]))
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > ratios[-1]


def test_once_converted_the_weights_load_without_torch(model: VoiceActivity, cache_dir: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from serve.models.voice_activity import VoiceActivity;"
        "from serve.models.base import LoadContext; from serve.spec import VoiceActivityOptions; m = VoiceActivity();"
        "m.load(LoadContext(Path(sys.argv[1]), VoiceActivityOptions(), 'cpu', 'float32', 1, 8, Path(sys.argv[2]),"
        "lambda what, done, total: None)); m.predict([m.prepare(m.signature.example)]);"
        "assert not {'torch', 'silero_vad'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(packaged()), str(cache_dir)], check=True)


def test_what_is_no_usable_sound_is_refused(model: VoiceActivity) -> None:
    with pytest.raises(UnsupportedMedia):
        model.prepare({"audio": b"text where a sound belongs"})
    with pytest.raises(InvalidInput, match=r"damaged|cut short"):
        model.prepare({"audio": SPEECH[:5000]})
    with pytest.raises(PayloadTooLarge, match="60 s"):
        model.prepare({"audio": recording(silence(61))})


def test_a_source_without_the_network_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds no silero_vad\.jit"):
        VoiceActivity().load(context(tmp_path, tmp_path / "cache"))


class Other(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_damaged_or_other_networks_do_not_load(tmp_path: Path) -> None:
    (tmp_path / "silero_vad.jit").write_bytes(b"garbage")
    with pytest.raises(LoadError, match=r"silero_vad\.jit is not Silero VAD"):
        VoiceActivity().load(context(tmp_path, tmp_path / "cache"))
    torch.jit.script(Other()).save(tmp_path / "silero_vad.jit")
    with pytest.raises(LoadError, match=r"silero_vad\.jit is not Silero VAD"):
        VoiceActivity().load(context(tmp_path, tmp_path / "cache"))


def test_a_gpu_is_refused_with_the_fix(cache_dir: Path) -> None:
    with pytest.raises(LoadError, match=r"computes on the CPU; set resources\.gpus to 0"):
        VoiceActivity().load(dataclasses.replace(context(packaged(), cache_dir), device="cuda"))
