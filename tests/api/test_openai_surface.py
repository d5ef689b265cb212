"""OpenAI's surface over HTTP, as its clients speak it."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from serve.api.model_app import build_model_app
from serve.api.openai_surface import of_request
from serve.errors import InvalidInput
from serve.models.base import Step
from serve.settings import Settings
from tests.api.toys import Embedder, Listener, Talker, direct, hosted, listening, spec

SETTINGS = Settings()
USER = [{"role": "user", "content": "one two three"}]


def client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


async def test_embeddings_as_numbers_and_as_base64() -> None:
    async with (
        hosted(spec("text-embedding"), Embedder()) as host,
        listening(build_model_app(host, settings=SETTINGS)) as url,
        client(url) as ask,
    ):
        default = await ask.embeddings.create(model="toy", input=["a b", "c"])
        numbers = await ask.embeddings.create(model="toy", input=["a b", "c"], encoding_format="float", dimensions=4)
        assert default.data[0].embedding == pytest.approx([3, 1, 0.1, -1])
        assert numbers.data[1].embedding == pytest.approx([1, 0, 0.1, -1])
        assert [entry.index for entry in default.data] == [0, 1]
        assert (default.usage.prompt_tokens, default.usage.total_tokens, default.model) == (3, 3, "toy")
        one = await ask.embeddings.create(model="toy", input="a b", user="somebody")
        assert len(one.data) == 1
        assert [model.id async for model in ask.models.list()] == ["toy"]
        assert (await ask.models.retrieve("toy")).object == "model"
        async with httpx.AsyncClient() as plain:
            body = {"model": "toy", "input": "a b", "encoding_format": "base64"}
            reply = await plain.post(f"{url}/v1/embeddings", json=body)
            raw = base64.b64decode(reply.json()["data"][0]["embedding"])
            assert np.frombuffer(raw, "<f4").tolist() == pytest.approx([3, 1, 0.1, -1])


async def test_a_chat_whole() -> None:
    async with (
        hosted(spec("text-generation"), Talker()) as host,
        listening(build_model_app(host, settings=SETTINGS)) as url,
        client(url) as ask,
    ):
        answer = await ask.chat.completions.create(
            model="toy", messages=USER, temperature=0, top_p=0.5, stop="zzz", presence_penalty=0, logprobs=False
        )
        assert answer.object == "chat.completion"
        assert answer.choices[0].message.content == "one two three "
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 3, 6)
        short = await ask.chat.completions.create(model="toy", messages=USER, max_completion_tokens=2)
        assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("one two ", "length")


async def test_the_settings_reach_the_model() -> None:
    model = Talker()
    async with hosted(spec("text-generation"), model) as host, direct(build_model_app(host, settings=SETTINGS)) as ask:
        body = {
            "model": "toy",
            "prompt": "a",
            "stop": ["x", "y"],
            "seed": 5,
            "top_p": 1,
            "max_tokens": 9,
            "temperature": 1,
        }
        assert (await ask.post("/v1/completions", json=body)).status_code == 200
    told = {"stop": ["x", "y"], "seed": 5, "top_p": 1.0, "max_tokens": 9, "temperature": 1.0}
    assert model.admitted[-1]["parameters"] == told


async def test_choices_take_seeds_that_follow_each_other() -> None:
    async with (
        hosted(spec("text-generation"), Talker()) as host,
        listening(build_model_app(host, settings=SETTINGS)) as url,
        client(url) as ask,
    ):
        chat = await ask.chat.completions.create(model="toy", messages=USER, n=3, seed=7)
        assert [choice.message.content.split()[-1] for choice in chat.choices] == ["seed=7", "seed=8", "seed=9"]
        assert chat.usage is not None
        assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (4, 12)
        plain = await ask.completions.create(model="toy", prompt=["a b", "c"], n=2, seed=1)
        assert [choice.text for choice in plain.choices] == ["a b seed=1 ", "a b seed=2 ", "c seed=1 ", "c seed=2 "]
        assert [choice.index for choice in plain.choices] == [0, 1, 2, 3]
        assert plain.usage is not None
        assert (plain.usage.prompt_tokens, plain.usage.completion_tokens) == (5, 10)


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("usage", [True, False])
async def test_streams_say_the_same_as_whole_answers(chat: bool, usage: bool) -> None:
    async with (
        hosted(spec("text-generation"), Talker()) as host,
        listening(build_model_app(host, settings=SETTINGS)) as url,
        client(url) as ask,
    ):
        options: dict[str, Any] = {"model": "toy", "stream": True, "n": 2, "seed": 1}
        if usage:
            options["stream_options"] = {"include_usage": True}
        stream = await (
            ask.chat.completions.create(messages=USER, **options)
            if chat
            else ask.completions.create(prompt="one two three", **options)
        )
        said, reasons, counted = {0: "", 1: ""}, {}, []
        async for chunk in stream:
            if chunk.usage is not None:
                counted.append(chunk.usage.total_tokens)
            for choice in chunk.choices:
                said[choice.index] += (choice.delta.content or "") if chat else choice.text
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
        assert said == {0: "one two three seed=1 ", 1: "one two three seed=2 "}
        assert reasons == {0: "stop", 1: "stop"}
        assert counted == ([12] if usage else [])


async def test_a_stream_on_the_wire() -> None:
    async with (
        hosted(spec("text-generation"), Talker()) as host,
        direct(build_model_app(host, settings=SETTINGS)) as ask,
    ):
        reply = await ask.post("/v1/chat/completions", json={"model": "toy", "messages": USER, "stream": True})
        assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = reply.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        first, *_, last = (json.loads(event.removeprefix("data: ")) for event in events[:-2])
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
        assert "usage" not in last


def test_the_synchronous_client_streams_too() -> None:
    async def run() -> str:
        async with (
            hosted(spec("text-generation"), Talker()) as host,
            listening(build_model_app(host, settings=SETTINGS)) as url,
        ):
            return await asyncio.to_thread(ask_synchronously, url)

    assert asyncio.run(run()) == "one two three "


def ask_synchronously(url: str) -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as ask:
        stream = ask.chat.completions.create(model="toy", messages=USER, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


async def test_what_goes_wrong_before_the_first_part_has_its_status() -> None:
    async with (
        hosted(spec("text-generation"), Talker()) as host,
        listening(build_model_app(host, settings=SETTINGS)) as url,
        client(url) as ask,
    ):
        messages = [*USER, {"role": "user", "content": "poison"}]
        with pytest.raises(openai.BadRequestError) as caught:
            await ask.chat.completions.create(model="toy", messages=messages, stream=True)
        assert caught.value.param == "messages"
        with pytest.raises(openai.InternalServerError, match="ValueError: crash"):
            await ask.completions.create(model="toy", prompt="crash now", stream=True)


async def test_what_goes_wrong_later_is_an_event() -> None:
    async with (
        hosted(spec("text-generation"), Talker()) as host,
        listening(build_model_app(host, settings=SETTINGS)) as url,
        client(url) as ask,
    ):
        said = ""
        with pytest.raises(openai.APIError, match="ValueError: crash"):
            async for chunk in await ask.completions.create(model="toy", prompt="well then crash", stream=True):
                said += chunk.choices[0].text
        assert said == "well then "


@pytest.mark.parametrize("prompt", ["loop", "silence"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_streams(prompt: str, stream: bool) -> None:
    model = Talker()
    async with hosted(spec("text-generation"), model) as host:
        app = build_model_app(host, settings=SETTINGS, watch_disconnect=True)
        async with listening(app) as url, httpx.AsyncClient(base_url=url) as ask:
            model.released.clear()
            body = {"model": "toy", "prompt": prompt, "stream": stream, "n": 3}
            asked = asyncio.ensure_future(ask.post("/v1/completions", json=body))
            while len(model.active) < 3:
                await asyncio.sleep(0.01)
            asked.cancel()
            assert await asyncio.to_thread(model.released.wait, 10)
            while host.stats().running:
                await asyncio.sleep(0.01)
            assert not model.active


async def test_a_cancelled_request_frees_its_stream() -> None:
    model = Talker()
    async with hosted(spec("text-generation"), model) as host, direct(build_model_app(host, settings=SETTINGS)) as ask:
        model.released.clear()
        asked = asyncio.ensure_future(ask.post("/v1/completions", json={"model": "toy", "prompt": "silence"}))
        while not model.active:
            await asyncio.sleep(0.01)
        asked.cancel()
        assert await asyncio.to_thread(model.released.wait, 10)


async def test_transcriptions() -> None:
    async with (
        hosted(spec("speech-to-text"), Listener()) as host,
        listening(build_model_app(host, settings=SETTINGS)) as url,
        client(url) as ask,
    ):
        sound = ("speech.wav", b"RIFF" + bytes(12))
        assert (await ask.audio.transcriptions.create(model="toy", file=sound)).text == "16 bytes"
        text = await ask.audio.transcriptions.create(model="toy", file=sound, response_format="text")
        assert text == "16 bytes\n"
        verbose: Any = await ask.audio.transcriptions.create(
            model="toy", file=sound, response_format="verbose_json", language="de", temperature=0
        )
        assert (verbose.text, verbose.language, float(verbose.duration)) == ("16 bytes", "de", 2.0)
        with pytest.raises(openai.BadRequestError) as caught:
            await ask.audio.transcriptions.create(model="toy", file=("a.txt", b"some text"))
        assert (caught.value.param, "no sound file" in str(caught.value)) == ("file", True)


async def test_a_reader_that_falls_behind_is_told() -> None:
    class Flood(Talker):
        def _step(self, key: int, state: dict[str, Any]) -> Step:
            return Step(key, {"text": "again ", "token_ids": [1]})

    async with hosted(spec("text-generation"), Flood()) as host:
        app = build_model_app(host, settings=SETTINGS)
        sent: list[bytes] = []
        body = json.dumps({"model": "toy", "prompt": "x", "stream": True}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Future()

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            while len(sent) == 2 and host.stats().running:
                await asyncio.sleep(0.01)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        await app(scope, receive, send)
    assert b"parts behind" in b"".join(sent[-2:])
    assert b"[DONE]" not in b"".join(sent)


@pytest.mark.parametrize(("row", "place"), [(1, "prompt[0]"), (2, "prompt[1]"), (3, "prompt[1]")])
def test_an_error_about_a_choice_names_its_prompt(row: int, place: str) -> None:
    error = InvalidInput("is too long", place=f"inputs row {row}, prompt")
    assert of_request(error, "prompt", choices=2).place == place
