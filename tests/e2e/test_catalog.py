"""Right answers on real input, over HTTP, from every model of the default catalog."""

from __future__ import annotations

import base64
import json
import math
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import tritonclient.http

from tests.e2e.running import Running

pytestmark = pytest.mark.e2e
DATA = Path(__file__).parents[1] / "data"


def infer(catalog: Running, model: str, inputs: list[dict[str, object]], **more: object) -> dict[str, list[object]]:
    response = httpx.post(f"{catalog.url}/v2/models/{model}/infer", json={"inputs": inputs, **more}, timeout=120)
    assert response.status_code == 200, response.text
    return {tensor["name"]: tensor["data"] for tensor in response.json()["outputs"]}


def encoded(name: str) -> str:
    return base64.b64encode((DATA / name).read_bytes()).decode()


def test_a_photograph_of_a_cat_is_a_cat(catalog: Running):
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [encoded("cat.jpg")]}
    label = infer(catalog, "efficientnet", [image])["label"][0]
    assert "cat" in str(label).lower()


def test_a_sentence_comes_back_as_its_words(catalog: Running):
    client = openai.OpenAI(base_url=f"{catalog.url}/v1", api_key="none")
    with (DATA / "speech.flac").open("rb") as recording:
        text = client.audio.transcriptions.create(model="whisper", file=recording).text
    heard = "".join(letter for letter in text.lower() if letter.isalpha() or letter == " ").split()
    assert heard == ["please", "open", "the", "window", "it", "is", "very", "warm", "in", "this", "room", "today"]


def test_similar_sentences_are_nearer_than_unrelated_ones(catalog: Running):
    client = openai.OpenAI(base_url=f"{catalog.url}/v1", api_key="none")
    sentences = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose in March."]
    vectors = np.array([e.embedding for e in client.embeddings.create(model="minilm", input=sentences).data])
    nearness = vectors @ vectors.T
    assert nearness[0, 1] > nearness[0, 2] + 0.3


def test_a_forecast_follows_a_sine_wave(catalog: Running):
    wave = [math.sin(2 * math.pi * step / 24) for step in range(240)]
    series = {"name": "series", "datatype": "FP32", "shape": [1, len(wave)], "data": wave}
    forecast = np.array(infer(catalog, "forecaster", [series])["median"], dtype=float).ravel()
    truth = np.array([math.sin(2 * math.pi * (240 + step) / 24) for step in range(len(forecast))])
    assert np.corrcoef(forecast, truth)[0, 1] > 0.9


def test_speech_is_found_where_it_is(catalog: Running):
    audio = {"name": "audio", "datatype": "BYTES", "shape": [1], "data": [encoded("speech.flac")]}
    segments = json.loads(str(infer(catalog, "vad", [audio])["segments"][0]))
    assert segments
    assert all(start < end for start, end in segments)


def streams_of(catalog: Running) -> tuple[int, int]:
    """Return how many streams SmolLM2 computes now, and how many it has ended."""
    (entry,) = httpx.get(f"{catalog.url}/v2/models/smollm2/stats").raise_for_status().json()["model_stats"]
    return entry["queue"]["running"], entry["inference_count"]


def test_chat_streams_its_first_token_before_the_last_is_computed(catalog: Running):
    client = openai.OpenAI(base_url=f"{catalog.url}/v1", api_key="none")
    _, ended = streams_of(catalog)
    stream = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Write a long story about a fox."}],
        max_tokens=64,
        temperature=0,
        stream=True,
    )
    texts = (chunk.choices[0].delta.content for chunk in stream if chunk.choices)
    first = next(text for text in texts if text)
    assert first
    assert streams_of(catalog) == (1, ended)  # the first is here while the model still computes the others
    assert len([text for text in texts if text]) > 30
    assert streams_of(catalog) == (0, ended + 1)


def test_a_stream_that_is_left_ends(catalog: Running):
    client = openai.OpenAI(base_url=f"{catalog.url}/v1", api_key="none")
    stream = client.completions.create(model="smollm2", prompt="One, two,", max_tokens=1500, stream=True)
    next(iter(stream))
    stream.close()
    began, running = time.monotonic(), 1
    while running and time.monotonic() - began < 30:
        running, _ = streams_of(catalog)
    assert running == 0  # 1,500 tokens would take longer


def test_chat_answers_a_question(catalog: Running):
    client = openai.OpenAI(base_url=f"{catalog.url}/v2/models/smollm2/v1", api_key="none")
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=30,
        temperature=0,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_tritonclient_works_unmodified(catalog: Running):
    client = tritonclient.http.InferenceServerClient(catalog.url.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("minilm")
    assert client.get_server_metadata()["name"]
    assert client.get_model_metadata("minilm")["inputs"][0]["name"] == "text"
    assert {entry["name"] for entry in client.get_model_repository_index()} >= {"minilm", "whisper"}
    text = tritonclient.http.InferInput("text", [2], "BYTES")
    text.set_data_from_numpy(np.array([b"one", b"two"], dtype=object))
    result = client.infer("minilm", [text], request_compression_algorithm="gzip")
    vectors = result.as_numpy("embedding")
    assert vectors.shape == (2, 384)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)


def test_a_model_that_is_not_there_is_named_with_its_neighbours(catalog: Running):
    response = httpx.get(f"{catalog.url}/v2/models/minilmm")
    assert response.status_code == 404
    assert "minilm" in response.json()["error"]


def test_status_lists_every_model(catalog: Running):
    done = catalog.command("status")
    assert done.returncode == 0, done.stderr
    for name in ("minilm", "smollm2", "efficientnet", "whisper", "forecaster", "vad"):
        assert name in done.stdout
    assert done.stdout.count("ready") >= 6


def test_predict_prints_an_answer(catalog: Running):
    done = catalog.command("predict", "efficientnet", f"@{DATA / 'cat.jpg'}")
    assert done.returncode == 0, done.stderr
    assert "cat" in done.stdout.lower()
