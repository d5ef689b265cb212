"""Text generation on vLLM, stepped in this process, so that nothing above it sees which engine answers."""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serve.errors import InvalidInput, LoadError, NotReady, PredictionFailed
from serve.models.base import Item, LoadContext, Step
from serve.models.chat import read_template
from serve.models.devices import use_threads
from serve.models.sampling import SamplingSettings
from serve.models.text_requests import SIGNATURE, Prepared, TextRequests, model_folder, read_tokenizer
from serve.spec import VLLM_OPTIONS

#: Of the share of a GPU that is the model's, what vLLM fills. CUDA and the kernels keep memory of their own beside it,
#: and it starts only where all that it is to fill is free.
_FILLED = 0.9

#: Seconds in which the platform notices a replica that is broken.
_RETRY_AFTER_S = 30.0

logger = logging.getLogger(__name__)


class _Stream:
    """What is known of one answer: the tokens of its prompt, and its own so far."""

    def __init__(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._tokens = 0

    def part(self, text: str, token_ids: list[int]) -> dict[str, Any]:
        """Return what one step brought."""
        self._tokens += len(token_ids)
        return {"text": text, "token_ids": token_ids}

    def last_part(self, text: str, token_ids: list[int], reason: str) -> dict[str, Any]:
        """Return what the last step brought, and what the answer came to."""
        return self.part(text, token_ids) | {
            "finish_reason": reason,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._tokens,
        }


class VllmGeneration:
    """A text model of any family that vLLM knows, from a Hugging Face folder, on one GPU.

    Requests are checked and tokenised as our own engine's are; vLLM gets tokens. Answers, texts and their ends are
    vLLM's.
    """

    signature = SIGNATURE
    slots = 0
    broken = False

    def load(self, context: LoadContext) -> None:
        """Start vLLM with the model.

        Raises:
            LoadError: vLLM is not installed, there is no GPU for it, or it does not take the model or an option.
        """
        _require_vllm(context.device)
        use_threads(context.threads)
        folder, options = model_folder(context), context.options
        tokenizer = read_tokenizer(folder)
        chat = read_template(folder, tokenizer, options.chat_template)
        context.progress("starting vLLM", 0, 0)
        self._engine = _start(folder, context)
        self._requests = TextRequests(
            tokenizer,
            chat,
            vocab_size=self._engine.model_config.get_vocab_size(),
            context_tokens=options.context_tokens,
            default_max_tokens=options.default_max_tokens,
        )
        self.slots = options.slots
        self._streams: dict[int, _Stream] = {}
        self._keys = itertools.count()

    def prepare(self, item: Item) -> Prepared:
        """Tokenise and check one item; raises as our own engine does."""
        return self._requests.read(item)

    def admit(self, prepared: Prepared) -> int:
        """Hand a stream to vLLM and return its key; its prompt is read by `step`.

        Raises:
            InvalidInput: vLLM refuses the request.
            NotReady: vLLM has failed, and the replica waits for being replaced.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input

        if self.broken:
            raise NotReady("vLLM has failed; the replica is replaced", phase="failed", retry_after_s=_RETRY_AFTER_S)
        key = next(self._keys)
        try:
            self._engine.add_request(str(key), tokens_input(list(prepared.prompt)), _sampling(prepared.settings))
        except VLLMClientError as error:
            raise InvalidInput(f"vLLM refuses it: {error}") from error
        self._streams[key] = _Stream(len(prepared.prompt))
        return key

    def step(self) -> Sequence[Step]:
        """Have vLLM compute one step; what it raises is the end of this engine."""
        try:
            outputs = self._engine.step()
        except Exception:
            # Nobody knows what is left of its scheduler and of CUDA's context; vLLM's own server ends here, too.
            self.broken = True
            raise
        return [self._advance(int(output.request_id), output) for output in outputs]

    def _advance(self, key: int, output: Any) -> Step:
        (answer,) = output.outputs
        tokens = list(answer.token_ids)
        if not output.finished:
            return Step(key, self._streams[key].part(answer.text, tokens))
        stream, reason = self._streams.pop(key), answer.finish_reason
        if reason not in ("stop", "length"):
            return Step(key, None, done=True, error=PredictionFailed(f"vLLM broke the answer off: {reason}"))
        # vLLM counts the token that ends an answer to it, unless a stop string ends it.
        if reason == "stop" and not isinstance(answer.stop_reason, str):
            tokens = tokens[:-1]
        return Step(key, stream.last_part(answer.text, tokens, reason), done=True)

    def release(self, key: int) -> None:
        """Have vLLM forget a stream whose caller left."""
        del self._streams[key]
        if not self.broken:
            self._engine.abort_request([str(key)])

    def close(self) -> None:
        """Stop vLLM, which gives the GPU's memory back."""
        self._engine.engine_core.shutdown()


def _require_vllm(device: str) -> None:
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
            fix = "pip install 'roundhouse-serve[vllm]', or leave options.engine out"
            raise LoadError(f"engine vllm is not installed here: {fix}") from error
        raise LoadError(f"engine vllm is installed here and does not import: {error}") from error
    if device != "cuda":
        raise LoadError(
            "engine vllm computes on an NVIDIA GPU, and none is visible here: check that nvidia-smi lists one, or "
            "leave options.engine out"
        )


def _start(folder: Path, context: LoadContext) -> Any:
    """Return vLLM's engine, its scheduler and its worker all in this process and on this thread."""
    from vllm import EngineArgs, LLMEngine
    from vllm.exceptions import VLLMError
    from vllm.v1.executor import Executor

    try:
        config = EngineArgs(**_arguments(folder, context)).create_engine_config()
        # The class's own `from_engine_args` starts another process unless a variable of the environment forbids it.
        return LLMEngine(
            vllm_config=config, executor_class=Executor.get_class(config), log_stats=False, multiprocess_mode=False
        )
    except (VLLMError, ValueError, RuntimeError, OSError) as error:
        logger.error("vLLM did not start", exc_info=error)
        raise LoadError(f"vLLM does not start with this model: {_words(error)}") from error


def _words(error: Exception) -> str:
    """Return what an error says; of a whole configuration's, what is wrong without the configuration."""
    if isinstance(error, ValidationError):
        return "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors(include_url=False))
    return str(error)


def _arguments(folder: Path, context: LoadContext) -> dict[str, Any]:
    """Return vLLM's engine arguments; an option that is not declared is left to vLLM."""
    options = context.options
    declared = {name: getattr(options, name) for name in VLLM_OPTIONS if getattr(options, name) is not None}
    return declared | {
        "model": str(folder),
        "trust_remote_code": False,
        "dtype": context.dtype,
        "max_model_len": options.context_tokens,
        "max_num_seqs": options.slots,
        "gpu_memory_utilization": _FILLED * context.gpus,
        "distributed_executor_backend": "uni",
        # vLLM draws what has no seed from one generator, which would begin the same in every replica.
        "seed": secrets.randbits(32),
    }


def _sampling(settings: SamplingSettings) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=settings.max_tokens,
        # vLLM raises what is next to 0 to 0.01, and 0 alone is greedy.
        temperature=0.0 if settings.greedy else settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        stop=list(settings.stop),
        output_kind=RequestOutputKind.DELTA,
    )
