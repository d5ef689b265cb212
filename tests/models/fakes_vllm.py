"""vLLM's interface, as far as the platform uses it, with a model that says its prompt again; test_vllm_engine.py holds
it against the real one."""

from __future__ import annotations

import copy
import json
import random
import sys
import uuid
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel, model_validator
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END = 256
_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def write_bytes_model(folder: Path, *, context: int = 512, template: str | None = _TEMPLATE) -> Path:
    """Write what vLLM needs of a model whose tokens are the 256 bytes and an end; it has no weights.

    Args:
        context: Tokens that the model was trained with.
        template: Its chat template, or None.
    """
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": END + 1, "eos_token_id": END}
    (folder / "config.json").write_text(json.dumps(config | sizes | {"max_position_embeddings": context}))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    named |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder


class VLLMError(Exception):
    """Base of what vLLM raises on purpose."""


class VLLMClientError(VLLMError):
    """The request is wrong."""


class VLLMValidationError(VLLMClientError):
    """A request, or a part of it, that vLLM does not take."""


class RequestOutputKind(Enum):
    """How much of an answer each output holds."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    """How an answer is drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = 16
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    output_text_buffer_length: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if 0 < self.temperature < 1e-2:
            self.temperature = 1e-2
        self.stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if self.stop:
            self.output_text_buffer_length = max(map(len, self.stop)) - 1
        if not 0 <= self.temperature <= 2:
            raise VLLMValidationError(f"temperature must be in [0, 2], got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise VLLMValidationError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise VLLMValidationError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if any(not text for text in self.stop):
            raise VLLMValidationError("stop cannot contain an empty string.")
        if self.temperature < 1e-5:
            self.top_p = 1.0


@dataclass
class CompletionOutput:
    """One answer, or the next part of it."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: Any
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    """What a step brought to one request."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: Any
    outputs: list[CompletionOutput]
    finished: bool


def tokens_input(prompt_token_ids: list[int], *, prompt: str | None = None) -> dict[str, Any]:
    """Return a prompt of tokens as the engine takes it."""
    return {"type": "token", "prompt_token_ids": prompt_token_ids} | ({} if prompt is None else {"prompt": prompt})


class ModelConfig(BaseModel):
    """What vLLM found out of a model."""

    model: str
    trained: int
    vocab_size: int
    max_model_len: int

    @classmethod
    def of(cls, arguments: EngineArgs) -> ModelConfig:
        config = json.loads((Path(arguments.model) / "config.json").read_text())
        trained: int = config["max_position_embeddings"]
        longest = trained if arguments.max_model_len is None else arguments.max_model_len
        return cls(model=arguments.model, trained=trained, vocab_size=config["vocab_size"], max_model_len=longest)

    @model_validator(mode="after")
    def _is_long_enough(self) -> ModelConfig:
        if self.max_model_len > self.trained:
            raise ValueError(f"max_model_len ({self.max_model_len}) is greater than the derived ({self.trained})")
        return self

    def get_vocab_size(self) -> int:
        """Return how many tokens the model has."""
        return self.vocab_size


class VllmConfig:
    """The whole of vLLM's configuration."""

    def __init__(self, arguments: EngineArgs) -> None:
        self.arguments = arguments
        self.model_config = ModelConfig.of(arguments)


@dataclass
class EngineArgs:
    """What an engine is started with."""

    model: str
    trust_remote_code: bool = False
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    seed: int = 0
    max_model_len: int | None = None
    distributed_executor_backend: str | None = None
    enable_prefix_caching: bool | None = None
    gpu_memory_utilization: float = 0.92
    max_num_seqs: int | None = None
    quantization: str | None = None
    enforce_eager: bool = False

    def create_engine_config(self) -> VllmConfig:
        """Return the configuration; raises ValueError for what does not fit."""
        return VllmConfig(self)


class Executor:
    """Where the model runs."""

    @staticmethod
    def get_class(vllm_config: VllmConfig) -> type[Executor]:
        """Return the class for a configuration."""
        return {"uni": UniProcExecutor}[str(vllm_config.arguments.distributed_executor_backend)]


class UniProcExecutor(Executor):
    """In this process."""


class _Core:
    """The part that holds the GPU."""

    def __init__(self) -> None:
        self.is_shut_down = False

    def shutdown(self, timeout: float | None = None) -> None:
        self.is_shut_down = True


@dataclass
class _Request:
    """One request: what the scheduler holds of it, and behind that what was made of it for the caller."""

    name: str
    prompt: list[int]
    params: SamplingParams
    draws: random.Random
    computed: list[int] = field(default_factory=list)
    told: list[int] = field(default_factory=list)
    shown: int = 0


class LLMEngine:
    """Says each prompt again and ends; with a temperature, says tokens of it in any order, without an end.

    Outputs come one step behind, as they do where vLLM schedules ahead. A prompt that holds `crash` makes a step
    raise, an answer to one with `preempt` is broken off, and one with `stall` gets three tokens and then no turn, as a
    request does that is preempted for want of memory.
    """

    #: All that were started, so that a test can see the one that a replica made.
    started: list[LLMEngine] = []  # noqa: RUF012

    def __init__(
        self,
        vllm_config: VllmConfig,
        executor_class: type[Executor],
        log_stats: bool,
        multiprocess_mode: bool = False,
    ) -> None:
        assert issubclass(executor_class, UniProcExecutor)
        assert not multiprocess_mode
        self.arguments = vllm_config.arguments
        if self.arguments.gpu_memory_utilization > 0.95:
            raise ValueError("Free memory on device is less than desired GPU memory utilization")
        self.model_config = vllm_config.model_config
        self.engine_core = _Core()
        self.steps = 0
        self.most = 0
        self.aborted: list[str] = []
        self._tokenizer = Tokenizer.from_file(str(Path(self.arguments.model) / "tokenizer.json"))
        self._requests: dict[str, _Request] = {}
        self._behind: deque[list[tuple[str, int, str | None]]] = deque([[]])
        self.started.append(self)

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> str:
        """Take a request; from then on it goes by a name of the engine's own."""
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, got {type(request_id)}")
        tokens = prompt["prompt_token_ids"]
        assert prompt["type"] == "token"
        if self._says(tokens, "refuse"):
            raise VLLMValidationError("this prompt is not taken")
        if not 0 < len(tokens) < self.model_config.max_model_len or max(tokens) >= self.model_config.get_vocab_size():
            raise VLLMValidationError(f"The decoder prompt (length {len(tokens)}) does not fit the model")
        name = f"{request_id}-{uuid.uuid4().hex[:8]}"
        self._requests[name] = _Request(request_id, tokens, copy.copy(params), random.Random(params.seed))
        return name

    def abort_request(self, request_ids: list[str]) -> None:
        """Forget requests, by the names that they came with."""
        self.aborted += request_ids
        for name, request in list(self._requests.items()):
            if request.name in request_ids:
                del self._requests[name]

    def has_unfinished_requests(self) -> bool:
        """Return whether any request waits for an output."""
        return bool(self._requests)

    def step(self) -> list[RequestOutput]:
        """Compute a token for as many requests as run together, and return what the step before brought."""
        self.steps += 1
        running = [
            entry for entry in self._requests.items() if not self._ended(entry[1]) and not self._stalls(entry[1])
        ]
        running = running[: self.arguments.max_num_seqs]
        self.most = max(self.most, len(running))
        if any(self._says(request.prompt, "crash") for _, request in running):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self._behind.append([(name, *self._compute(request)) for name, request in running])
        outputs = []
        for name, token, reason in self._behind.popleft():
            if name in self._requests:  # an output for what was aborted meanwhile is nobody's
                outputs.append(self._output(name, self._requests[name], token, reason))
        return outputs

    def _says(self, tokens: list[int], word: str) -> bool:
        return word in self._tokenizer.decode(tokens)

    def _stalls(self, request: _Request) -> bool:
        return len(request.computed) > 2 and self._says(request.prompt, "stall")

    def _ended(self, request: _Request) -> bool:
        full = len(request.prompt) + len(request.computed) >= self.model_config.max_model_len
        return bool(request.computed) and (
            full or request.computed[-1] == END or len(request.computed) == request.params.max_tokens
        )

    def _compute(self, request: _Request) -> tuple[int, str | None]:
        said = len(request.computed)
        if request.params.temperature > 0:
            token = request.draws.choice(request.prompt)
        else:
            token = request.prompt[said] if said < len(request.prompt) else END
        request.computed.append(token)
        if self._says(request.prompt, "preempt"):
            return token, "abort"
        if token == END:
            return token, "stop"
        return token, "length" if self._ended(request) else None

    def _output(self, name: str, request: _Request, token: int, reason: str | None) -> RequestOutput:
        before = self._tokenizer.decode(request.told)
        request.told.append(token)
        text, stop_reason = self._tokenizer.decode(request.told), None
        found = [(text.find(stop, max(0, len(before) - len(stop) + 1)), stop) for stop in request.params.stop or ()]
        if found := [(place + len(stop), place, stop) for place, stop in found if place >= 0]:
            _, place, stop_reason = min(found, key=lambda each: each[0])  # the first that is listed, of those at once
            text, reason = text[:place], "stop"
        held = 0 if reason else request.params.output_text_buffer_length
        end = len(text.rstrip("\ufffd")) - held  # a character that is cut off is never told
        shown, request.shown = text[request.shown : max(end, request.shown)], max(end, request.shown)
        if reason:
            del self._requests[name]
        assert request.params.output_kind is RequestOutputKind.DELTA
        answer = CompletionOutput(0, shown, [token], None, None, finish_reason=reason, stop_reason=stop_reason)
        return RequestOutput(request.name, None, request.prompt, None, [answer], finished=reason is not None)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `import vllm` find this module's classes."""
    LLMEngine.started.clear()
    found = {
        "vllm": {"EngineArgs": EngineArgs, "LLMEngine": LLMEngine, "SamplingParams": SamplingParams},
        "vllm.exceptions": {"VLLMError": VLLMError, "VLLMClientError": VLLMClientError},
        "vllm.inputs": {"tokens_input": tokens_input},
        "vllm.sampling_params": {"RequestOutputKind": RequestOutputKind, "SamplingParams": SamplingParams},
        "vllm.v1": {},
        "vllm.v1.executor": {"Executor": Executor},
    }
    for name, members in found.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
