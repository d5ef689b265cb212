"""vLLM's own engine, scheduler and processors above a worker that says each prompt again and needs no GPU; a program,
since it takes the place of vLLM's platform: `python -m tests.models.vllm_worker FOLDER [ahead]`."""

from __future__ import annotations

import json
import random
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from serve.errors import RoundhouseError
from serve.models.base import LoadContext, Step
from serve.models.sampling import SamplingSettings
from serve.models.text_requests import Prepared
from serve.models.vllm_engine import VllmGeneration
from serve.spec import GenerationOptions
from tests.models.fakes_vllm import END

CONTEXT = 128


def loaded(folder: Path, **options: Any) -> VllmGeneration:
    """Return a model of the folder, on the vLLM that is imported."""
    model = VllmGeneration()
    model.load(
        LoadContext(
            folder=folder,
            options=GenerationOptions(engine="vllm", context_tokens=CONTEXT, **options),
            device="cuda",
            dtype="bfloat16",
            threads=1,
            max_batch_size=1,
            cache_dir=folder,
            progress=lambda _what, _done, _total: None,
            gpus=0.5,
        )
    )
    return model


def ask(text: str, **parameters: Any) -> dict[str, Any]:
    """Return an item."""
    return {"prompt": text, "parameters": parameters}


def _answers(model: VllmGeneration, *items: Any) -> list[Any]:
    keys = [model.admit(model.prepare(item)) for item in items]
    parts: dict[int, list[Any]] = {key: [] for key in keys}
    running = set(keys)
    while running:
        for step in model.step():
            assert step.output is not None
            parts[step.key].append(step.output)
            running -= {step.key} if step.done else set()
    return [
        parts[key][-1]
        | {"text": "".join(part["text"] for part in parts[key])}
        | {"token_ids": [token for part in parts[key] for token in part["token_ids"]]}
        for key in keys
    ]


def _refusal(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except RoundhouseError as error:
        return type(error).__name__
    return "taken"


def scenario(model: VllmGeneration) -> dict[str, Any]:
    """Return what a model does in all that is asked of it, in JSON values."""
    drawn = {"temperature": 0.9, "max_tokens": 20}
    told: dict[str, Any] = {
        "answers": _answers(
            model,
            ask("Hello, Zürich ☂"),
            ask("one two three", stop=["never", "two"]),
            ask("one two", stop=["twos"]),
            ask("abcdef", max_tokens=4),
        ),
        "ends": _answers(model, ask("a" * (CONTEXT - 5)), ask("a☂", max_tokens=3), ask("a" * (CONTEXT - 1))),
        "drawn": _answers(model, *(ask("abcdefgh", seed=seed, **drawn) for seed in (3, 3, 4))),
        "greedy": _answers(model, ask("abcdefgh", temperature=1e-6)),
        "chat": _answers(model, {"messages": [{"role": "user", "content": "hi<end>"}]}),
    }
    left, kept = (model.admit(model.prepare(item)) for item in (ask("abc", temperature=1, max_tokens=90), ask("xyz")))
    model.step()
    model.step()
    model.release(left)
    steps: list[Step] = []
    while not any(step.done for step in steps):
        steps += model.step()
    told["after leaving"] = [{step.key for step in steps} == {kept}, model._engine.has_unfinished_requests()]
    outside, long = Prepared((1, END + 50), SamplingSettings(3)), Prepared((1,) * CONTEXT, SamplingSettings(3))
    told["refused"] = [_refusal(model.admit, outside), _refusal(model.admit, long)]
    told["afterwards"] = _answers(model, ask("and on"))
    model.admit(model.prepare(ask("crash")))
    raised = ""
    while not raised:
        try:
            model.step()
        except RuntimeError as error:
            raised = str(error)
    told["failed"] = [raised, model.broken, _refusal(model.admit, model.prepare(ask("abc")))]
    model.close()
    return told


def _stand_in(*, ahead: bool) -> None:
    """Have vLLM find a platform without a GPU and a worker without weights.

    Args:
        ahead: Schedule a step before the one that runs has ended, as vLLM does on a GPU.
    """
    import torch
    import vllm.platforms as platforms
    from vllm.platforms.cpu import CpuPlatform

    platforms._current_platform = CpuPlatform()
    from vllm.v1.executor import Executor
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.outputs import ModelRunnerOutput

    class Worker(Executor):
        supported_tasks = ("generate",)

        def _init_executor(self) -> None:
            self.requests: dict[str, Any] = {}
            self.output: Any = None
            self.tokenizer = Tokenizer.from_file(str(Path(self.model_config.model) / "tokenizer.json"))

        def collective_rpc(self, method: Any, *_: Any, **__: Any) -> list[Any]:
            layer = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
            answers = {
                "get_kv_cache_spec": {"layers.0.attn": layer},
                "determine_available_memory": 2**26,
                "get_supported_kv_cache_layouts": ["LBNHC", "LBHNC"],
            }
            return [answers.get(method)]

        def compile_or_warm_up_model(self) -> None:
            pass

        def execute_model(self, scheduled: Any, non_block: bool = False) -> Any:
            for new in scheduled.scheduled_new_reqs:
                params = new.sampling_params
                read = new.num_computed_tokens  # found in the prefix cache
                self.requests[new.req_id] = [new.prompt_token_ids, params, random.Random(params.seed), read, 0]
            names = list(scheduled.num_scheduled_tokens)
            tokens = [self._say(self.requests[name], scheduled.num_scheduled_tokens[name]) for name in names]
            order = {name: index for index, name in enumerate(names)}
            self.output = ModelRunnerOutput(req_ids=names, req_id_to_index=order, sampled_token_ids=tokens)
            return self._give(None if names else self.output, non_block)

        def _say(self, request: list[Any], count: int) -> list[int]:
            prompt, params, draws, _, said = request
            if "crash" in self.tokenizer.decode(prompt):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            request[3] += count
            if request[3] < len(prompt):
                return []
            request[4] += 1
            if params.temperature > 0:
                return [draws.choice(prompt)]
            return [prompt[said] if said < len(prompt) else END]

        def sample_tokens(self, grammar: Any, non_block: bool = False) -> Any:
            return self._give(self.output, non_block)

        def _give(self, value: Any, non_block: bool) -> Any:
            if not non_block:
                return value
            future: Future[Any] = Future()
            future.set_result(value)
            return future

        def check_health(self) -> None:
            pass

        def shutdown(self) -> None:
            pass

    def get_class(config: Any) -> type[Executor]:
        if hasattr(config, "scheduler_config"):
            config.scheduler_config.async_scheduling = ahead
        return Worker

    Worker.supports_async_scheduling = classmethod(lambda cls: True)
    Executor.get_class = staticmethod(get_class)


def main(folder: str, *flags: str) -> None:
    """Print what vLLM's engine does in the scenario, as one line of JSON."""
    _stand_in(ahead="ahead" in flags)
    print(json.dumps(scenario(loaded(Path(folder), slots=4))))


if __name__ == "__main__":
    main(*sys.argv[1:])
