from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.api.model_app import build_model_app
from serve.errors import InvalidInput, LoadError, NotReady, PredictionFailed, UnsupportedParameter
from serve.host import Host
from serve.models import build, devices
from serve.models.base import LoadContext, Step, SteppedModel
from serve.models.text_generation import TextGeneration
from serve.models.text_requests import read_tokenizer
from serve.models.vllm_engine import VllmGeneration
from serve.settings import Settings
from serve.spec import GenerationOptions, ModelSpec
from tests.api.toys import direct, listening
from tests.models import fakes_vllm
from tests.models.fakes_vllm import END, LLMEngine, write_bytes_model
from tests.models.vllm_worker import CONTEXT, ask, loaded, scenario


def declared(folder: Path, *, gpus: float = 1.0, dtype: str = "auto", **options: Any) -> ModelSpec:
    return ModelSpec.model_validate(
        {
            "name": "toy",
            "task": "text-generation",
            "source": f"file:{folder}",
            "dtype": dtype,
            "resources": {"gpus": gpus},
            "options": {"engine": "vllm", "context_tokens": CONTEXT} | options,
        }
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_torch_lacks_cuda", lambda: None)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:
    fakes_vllm.install(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bytes_model(tmp_path)


@contextlib.asynccontextmanager
async def serving(spec: ModelSpec) -> AsyncIterator[Host]:
    host = Host(spec, settings=Settings())
    await host.load()
    try:
        yield host
    finally:
        await host.close()


@contextlib.asynccontextmanager
async def client(spec: ModelSpec) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(spec) as host,
        listening(build_model_app(host, settings=Settings())) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as ask,
    ):
        yield ask


def engine() -> LLMEngine:
    (started,) = LLMEngine.started
    return started


async def parts_of(host: Host, item: Any) -> list[Any]:
    return [part async for part in host.stream(item)]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.001)


def test_the_engine_that_is_declared_is_built(folder: Path) -> None:
    assert isinstance(build(declared(folder)), VllmGeneration)
    assert isinstance(build(declared(folder)), SteppedModel)
    assert isinstance(build(declared(folder, engine="roundhouse")), TextGeneration)


# Loading


async def test_vllm_is_started_as_the_model_is_declared(folder: Path, vllm: None) -> None:
    async with serving(declared(folder, slots=3)):
        arguments = vars(engine().arguments) | {"seed": 0}
    assert arguments == {
        "model": str(folder),
        "trust_remote_code": False,
        "dtype": "bfloat16",
        "kv_cache_dtype": "auto",
        "seed": 0,
        "max_model_len": CONTEXT,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": None,
        "gpu_memory_utilization": 0.9,
        "max_num_seqs": 3,
        "quantization": None,
        "enforce_eager": False,
    }
    assert engine().engine_core.is_shut_down


async def test_what_is_declared_for_vllm_reaches_it(folder: Path, vllm: None) -> None:
    options = {
        "quantization": "fp8_per_block",
        "kv_cache_dtype": "fp8_e4m3",
        "enable_prefix_caching": False,
        "enforce_eager": True,
    }
    async with serving(declared(folder, gpus=0.5, dtype="float16", **options)):
        arguments = vars(engine().arguments)
    assert {name: arguments[name] for name in options} == options
    assert (arguments["gpu_memory_utilization"], arguments["dtype"]) == (0.45, "float16")


async def test_two_replicas_do_not_draw_the_same(folder: Path, vllm: None) -> None:
    async with serving(declared(folder)), serving(declared(folder)):
        first, second = (started.arguments.seed for started in LLMEngine.started)
    assert first != second


async def test_without_vllm_it_says_what_to_install(folder: Path, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(LoadError, match=r"not installed here: pip install 'roundhouse-serve\[vllm\]'"):
        await Host(declared(folder), settings=Settings()).load()


async def test_a_vllm_that_does_not_import_is_named(folder: Path, tmp_path: Path, gpu: None, monkeypatch: Any) -> None:
    package = tmp_path / "packages" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(LoadError, match=r"does not import: libcudart.so.13: cannot open"):
        await Host(declared(folder), settings=Settings()).load()


async def test_without_a_gpu_it_says_so(folder: Path, vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_torch_lacks_cuda", lambda: "no NVIDIA GPU is visible")
    with pytest.raises(LoadError, match="engine vllm computes on an NVIDIA GPU, and none is visible here"):
        await Host(declared(folder), settings=Settings()).load()


async def test_what_vllm_says_of_a_model_is_told(folder: Path, vllm: None) -> None:
    with pytest.raises(
        LoadError,
        match=r"^vLLM does not start with this model: max_model_len \(1024\) is greater than the derived \(512\)$",
    ):
        await Host(declared(folder, context_tokens=1024), settings=Settings()).load()


async def test_a_folder_without_a_tokenizer_is_refused_before_vllm_starts(folder: Path, vllm: None) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(LoadError, match=r"lacks tokenizer\.json"):
        await Host(declared(folder), settings=Settings()).load()
    assert not LLMEngine.started


# Answers


async def test_an_answer_is_whole_and_its_end_is_no_part_of_it(folder: Path, vllm: None) -> None:
    async with serving(declared(folder)) as host:
        (result,) = await host.infer([ask("Hello, Zürich ☂")])
    size = len("Hello, Zürich ☂".encode())
    assert result["text"] == "Hello, Zürich ☂"
    assert len(result["token_ids"]) == size
    assert END not in result["token_ids"]
    assert {name: result[name] for name in ("finish_reason", "prompt_tokens", "completion_tokens")} == {
        "finish_reason": "stop",
        "prompt_tokens": size,
        "completion_tokens": size,
    }


async def test_an_answer_comes_in_parts_of_whole_characters(folder: Path, vllm: None) -> None:
    async with serving(declared(folder)) as host:
        parts = await parts_of(host, ask("a☂b"))
    assert [part["text"] for part in parts] == ["a", "", "", "☂", "b", ""]
    assert ["finish_reason" in part for part in parts] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("prompt", "parameters", "tokens"),
    [("abcdef", {"max_tokens": 4}, 4), ("abcdef", {"max_tokens": 1}, 1), ("a" * 120, {}, CONTEXT - 120)],
)
async def test_an_answer_ends_where_max_tokens_or_the_context_does(
    folder: Path, vllm: None, prompt: str, parameters: dict[str, Any], tokens: int
) -> None:
    async with serving(declared(folder)) as host:
        (result,) = await host.infer([ask(prompt, **parameters)])
    assert (result["text"], result["completion_tokens"]) == (prompt[:tokens], tokens)
    assert result["finish_reason"] == "length"


async def test_a_stop_string_ends_an_answer_before_it(folder: Path, vllm: None) -> None:
    async with serving(declared(folder)) as host:
        parts = await parts_of(host, ask("one two three", stop=["never", "two"]))
        (held,) = await host.infer([ask("one two", stop=["twos"])])
    assert "".join(part["text"] for part in parts) == "one "
    assert (parts[-1]["finish_reason"], parts[-1]["completion_tokens"]) == ("stop", len("one two"))
    assert (held["text"], held["finish_reason"]) == ("one two", "stop")


async def test_a_character_that_max_tokens_cuts_off_is_left_out(folder: Path, vllm: None) -> None:
    async with serving(declared(folder)) as host:
        (result,) = await host.infer([ask("a☂", max_tokens=3)])
    assert (result["text"], result["completion_tokens"], result["finish_reason"]) == ("a", 3, "length")


async def test_a_seed_repeats_an_answer(folder: Path, vllm: None) -> None:
    settings = {"temperature": 0.9, "top_p": 0.8, "max_tokens": 40}
    async with serving(declared(folder)) as host:
        texts = [
            (await host.infer([ask("abcdefgh", seed=seed, **settings)]))[0]["text"] for seed in (3, 3, 4, 2**63 - 1)
        ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (1e-6, True), (1e-3, False), (1.0, False)])
async def test_next_to_no_temperature_is_none(folder: Path, vllm: None, temperature: float, greedy: bool) -> None:
    async with serving(declared(folder)) as host:
        (result,) = await host.infer([ask("abcdefghijklmnop", temperature=temperature, seed=1, max_tokens=16)])
    assert (result["text"] == "abcdefghijklmnop") == greedy


async def test_messages_go_through_the_models_template(tmp_path: Path, vllm: None) -> None:
    template = "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}"
    async with serving(declared(write_bytes_model(tmp_path, template=template))) as host:
        (result,) = await host.infer([{"messages": [{"role": "user", "content": "hi<end>"}]}])
        assert (result["text"], result["prompt_tokens"]) == ("user:hi<end>;", 13)
    LLMEngine.started.clear()
    async with serving(declared(write_bytes_model(tmp_path, template=None))) as host:
        with pytest.raises(InvalidInput, match="this model has no chat template"):
            await host.infer([{"messages": [{"role": "user", "content": "hi"}]}])


async def test_as_many_streams_run_together_as_there_are_slots(folder: Path, vllm: None) -> None:
    async with serving(declared(folder, slots=2)) as host:
        results = await host.infer([ask(f"{number} and more") for number in range(7)])
    assert [result["text"] for result in results] == [f"{number} and more" for number in range(7)]
    assert engine().most == 2


# Leaving and failing


def test_a_stream_that_is_released_is_aborted_and_brings_nothing_more(folder: Path, vllm: None) -> None:
    model = loaded(folder)
    left, kept = (model.admit(model.prepare(ask(text))) for text in ("abc", "xyz"))
    model.step()
    model.release(left)
    assert engine().aborted == [str(left)]
    steps: list[Step] = []
    while not any(step.done for step in steps):
        steps += model.step()
    assert {step.key for step in steps} == {kept}
    assert not engine().has_unfinished_requests()
    assert model.step() == []


async def test_a_caller_who_leaves_frees_the_engine(folder: Path, vllm: None) -> None:
    spec = declared(folder, slots=1)
    async with serving(spec) as host:
        warmed = len(engine().aborted)
        stream = host.stream(ask("stall"))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await until(lambda: not engine().has_unfinished_requests())
        assert len(engine().aborted) == warmed + 1
        assert (await host.infer([ask("next")]))[0]["text"] == "next"


async def test_a_request_that_vllm_refuses_is_the_callers_mistake(folder: Path, vllm: None) -> None:
    async with serving(declared(folder)) as host:
        with pytest.raises(InvalidInput, match="vLLM refuses it: this prompt is not taken"):
            await host.infer([ask("refuse this")])
        assert (await host.infer([ask("this")]))[0]["text"] == "this"
        with pytest.raises(UnsupportedParameter, match="top_k"):
            await host.infer([ask("this", top_k=3)])


async def test_an_answer_that_vllm_breaks_off_fails_alone(folder: Path, vllm: None) -> None:
    async with serving(declared(folder)) as host:
        whole, broken = await asyncio.gather(
            host.infer([ask("a neighbour")]), host.infer([ask("preempt")]), return_exceptions=True
        )
        assert host.is_alive
    assert isinstance(broken, PredictionFailed)
    assert "vLLM broke the answer off: abort" in str(broken)
    assert not isinstance(whole, BaseException)
    assert whole[0]["text"] == "a neighbour"


async def test_an_engine_that_fails_takes_its_streams_along_and_has_its_replica_replaced(
    folder: Path, vllm: None
) -> None:
    async with serving(declared(folder)) as host:
        assert host.is_alive
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in host.stream(ask("stall")):
                begun.set()

        reader = asyncio.create_task(read())
        await begun.wait()
        with pytest.raises(PredictionFailed, match="RuntimeError: CUDA error: an illegal memory access"):
            await host.infer([ask("crash")])
        with pytest.raises(PredictionFailed, match="CUDA error"):
            await reader
        assert not host.is_alive
        with pytest.raises(NotReady, match="vLLM has failed") as caught:
            await host.infer([ask("abc")])
    assert caught.value.phase == "failed"


# OpenAI's surface


async def test_a_chat_streams_and_counts(folder: Path, vllm: None) -> None:
    async with client(declared(folder)) as ask_openai:
        stream = await ask_openai.chat.completions.create(
            model="toy",
            messages=[{"role": "user", "content": "one two three"}],
            stream=True,
            stop="three",
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "one two "
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (13, 13)


async def test_completions_take_seeds_that_follow_each_other(folder: Path, vllm: None) -> None:
    async with client(declared(folder)) as ask_openai:
        options: dict[str, Any] = {"model": "toy", "prompt": "abcdefgh", "temperature": 1, "max_tokens": 20}
        both = await ask_openai.completions.create(**options, n=2, seed=7)
        second = await ask_openai.completions.create(**options, seed=8)
    assert both.choices[0].text != both.choices[1].text == second.choices[0].text
    assert [choice.finish_reason for choice in both.choices] == ["length", "length"]
    assert both.usage is not None
    assert both.usage.completion_tokens == 40


async def test_failures_have_their_status(folder: Path, vllm: None) -> None:
    async with serving(declared(folder)) as host, direct(build_model_app(host, settings=Settings())) as web:

        async def status(prompt: str) -> tuple[int, str]:
            reply: httpx.Response = await web.post("/v1/completions", json={"model": "toy", "prompt": prompt})
            return reply.status_code, json.dumps(reply.json())

        assert (await status("abc"))[0] == 200
        code, body = await status("refuse")
        assert (code, "vLLM refuses it" in body) == (400, True)
        assert (await status("crash"))[0] == 500
        assert (await status("abc"))[0] == 503


# The fake is true


def real(place: str) -> Any:
    module, _, path = place.partition(":")
    pytest.importorskip("vllm", reason="vLLM is not installed; its wheels are for CUDA", exc_type=ImportError)
    found = import_module(module)
    for step in path.split("."):
        found = getattr(found, step)
    return found


@pytest.mark.parametrize(
    ("fake", "place"),
    [
        (fakes_vllm.LLMEngine.__init__, "vllm:LLMEngine.__init__"),
        (fakes_vllm.LLMEngine.add_request, "vllm:LLMEngine.add_request"),
        (fakes_vllm.LLMEngine.abort_request, "vllm:LLMEngine.abort_request"),
        (fakes_vllm.LLMEngine.step, "vllm:LLMEngine.step"),
        (fakes_vllm.LLMEngine.has_unfinished_requests, "vllm:LLMEngine.has_unfinished_requests"),
        (fakes_vllm.EngineArgs.create_engine_config, "vllm:EngineArgs.create_engine_config"),
        (fakes_vllm.EngineArgs, "vllm:EngineArgs"),
        (fakes_vllm.Executor.get_class, "vllm.v1.executor:Executor.get_class"),
        (fakes_vllm.ModelConfig.get_vocab_size, "vllm.config:ModelConfig.get_vocab_size"),
        (fakes_vllm._Core.shutdown, "vllm.v1.engine.core_client:InprocClient.shutdown"),
        (fakes_vllm.tokens_input, "vllm.inputs:tokens_input"),
        (fakes_vllm.SamplingParams, "vllm.sampling_params:SamplingParams"),
        (fakes_vllm.RequestOutput, "vllm.outputs:RequestOutput"),
        (fakes_vllm.CompletionOutput, "vllm.outputs:CompletionOutput"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_fake_takes_vllm_takes(fake: Callable[..., Any], place: str) -> None:
    ours, theirs = (inspect.signature(each).parameters for each in (fake, real(place)))
    assert [name for name in theirs if name in ours] == list(ours)
    assert not [
        name
        for name, parameter in theirs.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in ours
    ]
    given = [name for name, parameter in ours.items() if parameter.default is not parameter.empty]
    assert [str(theirs[name].default) for name in given] == [str(ours[name].default) for name in given]


def test_what_the_fake_raises_is_of_vllms_kinds() -> None:
    theirs = real("vllm.exceptions:VLLMValidationError")
    assert [kind.__name__ for kind in theirs.__mro__] == [
        kind.__name__ for kind in fakes_vllm.VLLMValidationError.__mro__
    ]


def test_the_kinds_of_output_are_vllms() -> None:
    theirs = {kind.name: kind.value for kind in real("vllm.sampling_params:RequestOutputKind")}
    assert theirs == {kind.name: kind.value for kind in fakes_vllm.RequestOutputKind}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0, "top_p": 0.5, "max_tokens": 7},
        {"temperature": 1e-3},
        {"temperature": 2.0, "top_p": 1.0, "seed": 2**63 - 1},
        {"stop": ["a", "abcd"]},
        {"temperature": -1.0},
        {"temperature": 2.1},
        {"top_p": 0.0},
        {"max_tokens": 0},
        {"stop": [""]},
    ],
    ids=str,
)
def test_sampling_settings_mean_to_the_fake_what_they_mean_to_vllm(settings: dict[str, Any]) -> None:
    def read(kind: Callable[..., Any]) -> Any:
        try:
            made = kind(**settings)
        except (fakes_vllm.VLLMError, real("vllm.exceptions:VLLMError")):
            return "refused"
        return {name: getattr(made, name) for name in vars(fakes_vllm.SamplingParams()) if name != "output_kind"}

    assert read(fakes_vllm.SamplingParams) == read(real("vllm.sampling_params:SamplingParams"))


def told_by_the_fake(folder: Path, tokens: list[int], settings: dict[str, Any]) -> list[Any]:
    config = fakes_vllm.EngineArgs(model=str(folder), distributed_executor_backend="uni").create_engine_config()
    fake = LLMEngine(config, fakes_vllm.Executor.get_class(config), log_stats=False)
    kind = fakes_vllm.RequestOutputKind.DELTA
    fake.add_request("0", fakes_vllm.tokens_input(tokens), fakes_vllm.SamplingParams(**settings, output_kind=kind))
    told = []
    while fake.has_unfinished_requests():
        told += fake.step()
    return told


def told_by_vllm(
    folder: Path, tokens: list[int], settings: dict[str, Any], computed: Sequence[tuple[int, str | None]]
) -> list[Any]:
    """Return what vLLM's own output processor makes of the tokens that were computed for one request."""
    from transformers import PreTrainedTokenizerFast

    processor_class = real("vllm.v1.engine.output_processor:OutputProcessor")
    kind = real("vllm.sampling_params:RequestOutputKind").DELTA
    request = real("vllm.v1.engine:EngineCoreRequest")(
        request_id="0-abc",
        external_req_id="0",
        prompt_token_ids=tokens,
        mm_features=None,
        sampling_params=real("vllm.sampling_params:SamplingParams")(**settings, output_kind=kind),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<end>")
    processor = processor_class(tokenizer, log_stats=False)
    processor.add_request(request, None)
    told = []
    for token, reason in computed:
        ended = real("vllm.v1.engine:FinishReason")[reason.upper()] if reason else None
        output = real("vllm.v1.engine:EngineCoreOutput")("0-abc", [token], finish_reason=ended)
        told += processor.process_outputs([output]).request_outputs
    return told


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ("Zürich ☂ and on", {}),
        ("one two three", {"stop": ["never", "two"]}),
        ("one two three", {"stop": ["o thr", "two"]}),
        ("one two three", {"stop": ["two", "ne two"]}),
        ("one two", {"stop": ["twos"]}),
        ("abcdef", {"max_tokens": 3}),
        ("a☂", {"max_tokens": 3}),
        ("preempt", {}),
    ],
)
def test_the_fake_tells_of_tokens_what_vllm_tells(folder: Path, prompt: str, settings: dict[str, Any]) -> None:
    settings = {"temperature": 0.0, "max_tokens": 50} | settings
    tokens = read_tokenizer(folder).encode(prompt).ids
    ours = [(each.request_id, each.finished, each.outputs[0]) for each in told_by_the_fake(folder, tokens, settings)]
    # A stop string is found in the text, by the processor; whoever computes tokens does not see it.
    computed = [
        (answer.token_ids[0], None if isinstance(answer.stop_reason, str) else answer.finish_reason)
        for _, _, answer in ours
    ]
    theirs = told_by_vllm(folder, tokens, settings, computed)
    assert [(each.request_id, each.finished) for each in theirs] == [each[:2] for each in ours]
    for name in ("text", "token_ids", "finish_reason", "stop_reason"):
        assert [getattr(each.outputs[0], name) for each in theirs] == [getattr(each[2], name) for each in ours], name


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["ahead"]])
def test_vllms_own_engine_does_what_the_fake_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    real("vllm:LLMEngine")
    command = [sys.executable, "-m", "tests.models.vllm_worker", str(folder), *flags]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=os.environ | quiet, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    fakes_vllm.install(monkeypatch)
    assert json.loads(done.stdout.splitlines()[-1]) == scenario(loaded(folder, slots=4))


# A GPU


def answers_of(model: SteppedModel, items: Sequence[Any]) -> list[list[int]]:
    keys = [model.admit(model.prepare(item)) for item in items]
    tokens: dict[int, list[int]] = {key: [] for key in keys}
    running = set(keys)
    while running:
        for step in model.step():
            assert step.error is None
            tokens[step.key] += (step.output or {}).get("token_ids", [])
            running -= {step.key} if step.done else set()
    return [tokens[key] for key in keys]


@pytest.mark.gpu
def test_vllm_on_a_gpu_says_what_our_own_engine_says(
    smollm2_folder: Path, smollm2_greedy: list[Any], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("vllm", reason="vLLM is not installed; its wheels are for CUDA", exc_type=ImportError)
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    options = GenerationOptions(slots=8, context_tokens=512)
    items = [
        {"messages": [{"role": "user", "content": each["prompt"]}], "parameters": {"max_tokens": 8}}
        for each in smollm2_greedy[:8]
    ]
    found = []
    for model in (TextGeneration(), VllmGeneration()):
        model.load(
            LoadContext(
                folder=smollm2_folder,
                options=options,
                device="cuda",
                dtype="bfloat16",
                threads=1,
                max_batch_size=1,
                cache_dir=tmp_path,
                progress=lambda _what, _done, _total: None,
                gpus=0.3,
            )
        )
        found.append(answers_of(model, items))
    model.close()
    # In bfloat16, two candidates that all but tie may come out in either order.
    assert sum(ours == theirs for ours, theirs in zip(*found, strict=True)) >= 6
