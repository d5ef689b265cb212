"""The schema of a model and of the platform, the same in models.yaml, the chart's values and the Model resource."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?([kMGT]|[KMGT]i)?$"

Task = Literal[
    "text-embedding",
    "text-generation",
    "image-classification",
    "speech-to-text",
    "forecast",
    "voice-activity",
    "python",
]

#: Tasks whose items have a cost besides their number, so that `batching.max_batch_cost` means something.
COSTED_TASKS = frozenset({"text-embedding", "python"})

#: Scheme -> (what follows it, for people; the pattern of the whole source).
SOURCES = {
    "package": ("NAME or NAME/FOLDER of an installed package", r"^package:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(/\S+)?$"),
    "file": ("PATH, relative to the declaration or absolute", r"^file:[^\x00-\x1f]+$"),
    "hf": ("OWNER/NAME on the hub", r"^hf:[\w.-]+(/[\w.-]+)*$"),
    "s3": ("//BUCKET/PREFIX", r"^s3://[^\s/]+(/[^\x00-\x1f]*)?$"),
    "gs": ("//BUCKET/PREFIX", r"^gs://[^\s/]+(/[^\x00-\x1f]*)?$"),
    "https": ("//HOST/FILE", r"^https://[^\s/@]+/\S+$"),
}

_SUFFIXES = {"": 1} | {
    letter + binary: (1024 if binary else 1000) ** power
    for binary in ("", "i")
    for power, letter in enumerate("KMGT" if binary else "kMGT", start=1)
}


def parse_quantity(value: object) -> object:
    """Turn a Kubernetes quantity of bytes such as `512Mi` into an int; anything but text is returned as it is."""
    if not isinstance(value, str):
        return value
    number = re.match(r"[0-9.]*", value, re.ASCII)
    digits = number.group() if number else ""
    if re.fullmatch(QUANTITY_PATTERN, value, re.ASCII) and len(digits) <= 30:
        amount = Fraction(digits) * _SUFFIXES[value[len(digits) :]]
        if amount.denominator == 1:
            return int(amount)
    suffix = _near_suffix(value[len(digits) :])
    near = f"{digits}{suffix}" if digits and suffix else None
    raise PydanticCustomError(
        "quantity",
        "{shown} is not a whole quantity of bytes such as 512Mi, 2Gi or 1000000",
        {"shown": repr(value), "suggestion": near if near != value else None},
    )


def _near_suffix(written: str) -> str | None:
    letters = written.strip().lower().removesuffix("b")
    return next((suffix for suffix in _SUFFIXES if suffix.lower() == letters), None)


_ByteCount = Annotated[int, Field(ge=1, le=2**60)]
Bytes = Annotated[
    _ByteCount,
    BeforeValidator(
        parse_quantity, json_schema_input_type=_ByteCount | Annotated[str, Field(pattern=QUANTITY_PATTERN)]
    ),
]


def source_scheme(source: str) -> str:
    """Return what stands before the first colon of a source: `package`, `file`, `hf`, `s3`, `gs` or `https`."""
    return source.partition(":")[0]


def check_source(source: str) -> str:
    """Return the source as it is; raises where its scheme or form is none of `SOURCES`."""
    scheme, colon, rest = source.partition(":")
    form = SOURCES.get(scheme) if colon else None
    if form is None:
        schemes = ", ".join(f"{name}:" for name in SOURCES)
        raise PydanticCustomError(
            "source",
            "{shown} does not begin with one of {schemes}",
            {"shown": repr(source), "schemes": schemes, "suggestion": _near_source(source)},
        )
    climbs = scheme in ("package", "hf", "s3", "gs") and {"", ".", ".."} & set(rest.strip("/").split("/"))
    if re.fullmatch(form[1], source, re.ASCII) and not climbs:
        return source
    raise PydanticCustomError(
        "source",
        "{shown} is not of the form {form}",
        {"shown": repr(source), "form": f"{scheme}:{form[0]}", "suggestion": None},
    )


def _near_source(source: str) -> str | None:
    scheme, colon, rest = source.partition(":")
    if not colon:
        return f"file:{source}" if source.startswith((".", "/")) else None
    near = {"http": "https", "huggingface": "hf", "gcs": "gs", "s3a": "s3", "pkg": "package", "path": "file"}
    known = near.get(scheme.lower(), scheme.lower())
    return f"{known}:{rest}" if known in SOURCES else None


Source = Annotated[
    str,
    AfterValidator(check_source),
    Field(json_schema_extra={"pattern": "|".join(f"({pattern})" for _, pattern in SOURCES.values())}),
]


def _whole_above_one(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise PydanticCustomError(
            "gpus",
            "{gpus} is above 1 and not whole; only a share of one GPU may be a fraction",
            {"gpus": gpus, "suggestion": str(round(gpus))},
        )
    return gpus


class Strict(BaseModel):
    """Base of every part of the schema: unknown keys fail, nothing is coerced silently, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Batching(Strict):
    """How requests are run together."""

    max_batch_size: int = Field(default=1, ge=1, le=4096, description="Items in one batch.")
    max_wait_ms: float = Field(
        default=0.0,
        ge=0,
        le=60_000,
        description="How long an idle model may wait for company before it starts a batch; 0 starts at once.",
    )
    max_batch_cost: int | None = Field(
        default=None,
        ge=1,
        description="Cost of one batch in the task's own unit (tokens for text); none means no bound but the size.",
    )
    max_queue: int = Field(default=1024, ge=1, description="Items that may wait.")
    max_queue_bytes: Bytes = Field(default=256 * 2**20, description="Bytes of the items that may wait.")


class Scaling(Strict):
    """How many replicas there are."""

    min_replicas: int = Field(default=1, ge=1, le=1000, description="Replicas that there always are.")
    max_replicas: int = Field(default=1, ge=1, le=1000, description="Replicas that there are at most.")
    target_ongoing_requests: float = Field(
        default=16.0, gt=0, description="Requests in flight that one replica should have."
    )


class Objectives(Strict):
    """What the model promises its callers, and alerts watch."""

    latency_ms: float | None = Field(
        default=None,
        gt=0,
        le=86_400_000,
        description="Time in which an answer begins: of a stream its first part, of any other all of it; without it,"
        " none is promised.",
    )
    latency_ratio: float = Field(
        default=0.99, gt=0, lt=1, description="Share of the answers that begin within `latency_ms`."
    )
    availability: float = Field(
        default=0.999, gt=0, lt=1, description="Share of the requests that no fault of the platform or the model fails."
    )


class Resources(Strict):
    """What one replica takes."""

    cpus: float = Field(default=1.0, gt=0, le=1024, description="CPU cores, and compute threads.")
    gpus: Annotated[float, AfterValidator(_whole_above_one)] = Field(
        default=0.0, ge=0, le=64, description="GPUs; a fraction shares one GPU with other models."
    )
    memory: Bytes | None = Field(default=None, description="Bytes of main memory.")


class Limits(Strict):
    """What one request may ask."""

    max_request_bytes: Bytes = Field(default=32 * 2**20, description="Bytes of a body, decompressed.")
    max_items: int = Field(default=256, ge=1, description="Items in one request.")


class EmbeddingOptions(Strict):
    """Options of `text-embedding`."""

    pooling: Literal["mean", "cls"] = Field(
        default="mean", description="How token vectors become one: their mean, or the first."
    )
    normalize: bool = Field(default=True, description="Scale each embedding to length 1.")
    max_tokens: int | None = Field(default=None, ge=1, description="Longest input; none takes the model's own limit.")
    truncate: bool = Field(default=True, description="Cut an input that is too long; otherwise it is refused.")


class GenerationOptions(Strict):
    """Options of `text-generation`."""

    engine: Literal["roundhouse", "vllm"] = Field(
        default="roundhouse", description="What computes the answers; `vllm` wants a GPU, and vLLM installed."
    )
    slots: int = Field(default=8, ge=1, le=1024, description="Streams that are computed together.")
    context_tokens: int = Field(default=2048, ge=16, description="Prompt and answer of one stream together.")
    chat_template: str | None = Field(default=None, description="A Jinja template in place of the model's own.")
    default_max_tokens: int = Field(default=256, ge=1, description="Length of an answer whose request does not say.")
    quantization: Literal["fp8_per_tensor", "fp8_per_channel", "fp8_per_block"] | None = Field(
        default=None,
        description="With `engine: vllm`: make weights smaller as they load; none leaves them as they are.",
    )
    kv_cache_dtype: Literal["fp8_e4m3", "fp8_e5m2"] | None = Field(
        default=None, description="With `engine: vllm`: type of the cache; none takes that of the weights."
    )
    enable_prefix_caching: bool | None = Field(
        default=None,
        description="With `engine: vllm`: read the same beginning of prompts once; none is vLLM's default.",
    )
    enforce_eager: bool | None = Field(
        default=None, description="With `engine: vllm`: start sooner and answer slower, without compiled graphs."
    )


class ClassificationOptions(Strict):
    """Options of `image-classification`."""

    top_k: int = Field(default=5, ge=1, le=1000, description="Classes in an answer.")
    labels: str | None = Field(default=None, description="A JSON list of names in the source; none takes ImageNet's.")


class SpeechOptions(Strict):
    """Options of `speech-to-text`."""

    beam_size: int = Field(default=1, ge=1, le=16, description="Hypotheses kept while decoding; 1 is greedy.")
    language: str = Field(default="en", description="Language of the speech, an ISO 639-1 code.")
    max_audio_s: float = Field(default=600.0, gt=0, description="Longest audio, seconds.")


class ForecastOptions(Strict):
    """Options of `forecast`."""

    max_context: int = Field(default=2048, ge=1, description="Steps of history that are used.")


class VoiceActivityOptions(Strict):
    """Options of `voice-activity`."""

    threshold: float = Field(default=0.5, gt=0, lt=1, description="Probability that counts as speech.")
    max_audio_s: float = Field(default=600.0, gt=0, description="Longest audio, seconds.")


class PythonOptions(Strict):
    """Options of `python`."""

    class_name: str = Field(alias="class", description="The class in the source's file.")
    arguments: dict[str, JsonValue] = Field(default_factory=dict, description="Keyword arguments of the class.")


#: Options of `text-generation` that its own engine does not read.
VLLM_OPTIONS = ("quantization", "kv_cache_dtype", "enable_prefix_caching", "enforce_eager")

OPTIONS: dict[str, type[Strict]] = {
    "text-embedding": EmbeddingOptions,
    "text-generation": GenerationOptions,
    "image-classification": ClassificationOptions,
    "speech-to-text": SpeechOptions,
    "forecast": ForecastOptions,
    "voice-activity": VoiceActivityOptions,
    "python": PythonOptions,
}


@dataclass(frozen=True, slots=True)
class Rule:
    """What several fields of a model must satisfy together, told apart from the fields so that each is checked once.

    Args:
        place: The field that a broken rule is blamed on, as a dotted path into the model.
        reads: The fields whose values `broken` takes, in its order.
        broken: Returns what is wrong, or None.
        given: Fields of which `broken` takes, after the values, only whether they are given.
    """

    place: str
    reads: tuple[str, ...]
    broken: Callable[..., str | None]
    given: tuple[str, ...] = ()


def _replicas(least: int, most: int) -> str | None:
    return f"{most} is below min_replicas, {least}" if most < least else None


def _batch_fits_queue(batch: int, queue: int) -> str | None:
    return f"{batch} is above max_queue, {queue}; such a batch could never fill" if batch > queue else None


def _cost_known(task: str, cost: int | None) -> str | None:
    if cost is None or task in COSTED_TASKS:
        return None
    return f"items of {task} have no cost besides their number; leave it out and set max_batch_size"


def _latency_before_deadline(latency_ms: float | None, deadline_ms: float) -> str | None:
    if latency_ms is None or latency_ms <= deadline_ms:
        return None
    return f"{latency_ms:g} is above deadline_ms, {deadline_ms:g}; no request waits that long for its answer"


def _cuda_has_gpu(device: str, gpus: float) -> str | None:
    return (
        "cuda takes a GPU and resources.gpus is 0; give it 1 or a fraction" if device == "cuda" and not gpus else None
    )


def _gpu_is_used(device: str, gpus: float) -> str | None:
    return f"{gpus:g} is reserved and device is cpu; leave one of them out" if device == "cpu" and gpus else None


def _vllm_has_gpu(task: str, options: Mapping[str, Any], device: str, gpus: float) -> str | None:
    if task != "text-generation" or options.get("engine") != "vllm":
        return None
    if device == "cpu":
        return "vllm computes on a GPU and device is cpu; leave device out and give resources.gpus 1 or a fraction"
    if not 0 < gpus <= 1:
        return f"vllm computes on one GPU and resources.gpus is {gpus:g}; give it 1 or a fraction"
    return None


def _read_by_vllm(option: str) -> Callable[[str, Mapping[str, Any]], str | None]:
    def broken(task: str, options: Mapping[str, Any]) -> str | None:
        given = task == "text-generation" and options.get(option) is not None
        own = options.get("engine", "roundhouse") == "roundhouse"
        return "is read by engine: vllm alone; set that, or leave this out" if given and own else None

    return broken


def _https_is_pinned(source: str, pinned: bool) -> str | None:
    return (
        "an https: source takes sha256, that of the file" if source_scheme(source) == "https" and not pinned else None
    )


def _sha256_has_file(source: str, pinned: bool) -> str | None:
    return "only an https: source takes sha256" if pinned and source_scheme(source) != "https" else None


def _revision_has_hub(source: str, given: bool) -> str | None:
    return "only an hf: source takes revision" if given and source_scheme(source) != "hf" else None


RULES = (
    Rule("scaling.max_replicas", ("scaling.min_replicas", "scaling.max_replicas"), _replicas),
    Rule("batching.max_batch_size", ("batching.max_batch_size", "batching.max_queue"), _batch_fits_queue),
    Rule("batching.max_batch_cost", ("task", "batching.max_batch_cost"), _cost_known),
    Rule("objectives.latency_ms", ("objectives.latency_ms", "deadline_ms"), _latency_before_deadline),
    Rule("device", ("device", "resources.gpus"), _cuda_has_gpu),
    Rule("resources.gpus", ("device", "resources.gpus"), _gpu_is_used),
    Rule("options.engine", ("task", "options", "device", "resources.gpus"), _vllm_has_gpu),
    *(Rule(f"options.{option}", ("task", "options"), _read_by_vllm(option)) for option in VLLM_OPTIONS),
    Rule("source", ("source",), _https_is_pinned, given=("sha256",)),
    Rule("sha256", ("source",), _sha256_has_file, given=("sha256",)),
    Rule("revision", ("source",), _revision_has_hub, given=("revision",)),
)


class ModelSpec(Strict):
    """One model, as declared."""

    name: str = Field(
        pattern=NAME_PATTERN, max_length=40, description="Names the model in URLs; small letters, digits and hyphens."
    )
    task: Task = Field(description="What the model does.")
    source: Source = Field(
        description="Where the model's files are: `package:`, `file:`, `hf:`, `s3:`, `gs:`, `https:`."
    )
    sha256: str | None = Field(
        default=None, pattern=SHA256_PATTERN, description="Of the file that an `https:` source names; required there."
    )
    revision: str | None = Field(
        default=None, min_length=1, max_length=128, description="Commit, tag or branch of an `hf:` source."
    )
    description: str = Field(default="", description="One line for people.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where it runs; auto takes a GPU where it has one."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of its weights; auto takes the task's own."
    )
    batching: Batching = Batching()
    scaling: Scaling = Scaling()
    objectives: Objectives = Objectives()
    resources: Resources = Resources()
    limits: Limits = Limits()
    deadline_ms: float = Field(
        default=60_000.0, gt=0, le=86_400_000, description="Longest time to an answer; a request may ask for less."
    )
    #: Once validated, it holds every option of the task, so that equal models are equal however they are written.
    options: dict[str, Any] = Field(
        default_factory=dict, validate_default=True, description="The task's own options; see the task."
    )

    @field_validator("options")
    @classmethod
    def _complete_options(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if "task" not in info.data:
            return options
        try:
            return OPTIONS[info.data["task"]].model_validate(options).model_dump(by_alias=True)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise PydanticCustomError("options", "{problems}", {"problems": "; ".join(lines)}) from error

    @model_validator(mode="after")
    def _keep_rules(self) -> ModelSpec:
        broken = []
        for rule in RULES:
            values = [attrgetter(path)(self) for path in rule.reads]
            message = rule.broken(*values, *(getattr(self, field) is not None for field in rule.given))
            if message:
                broken.append(f"{rule.place}: {message}")
        if broken:
            raise PydanticCustomError("rules", "{problems}", {"problems": "; ".join(broken)})
        return self

    def task_options(self) -> Strict:
        """Return `options` as the task's own schema."""
        return OPTIONS[self.task].model_validate(self.options)


class PlatformSpec(Strict):
    """A whole models.yaml."""

    models: list[ModelSpec] = Field(description="The models, each with a name of its own.")

    @model_validator(mode="after")
    def _names_differ(self) -> PlatformSpec:
        names = [model.name for model in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PydanticCustomError("names", "declared more than once: {names}", {"names": ", ".join(twice)})
        return self


def render_spec(spec: ModelSpec) -> dict[str, Any]:
    """Return the canonical form of a spec: JSON values only, every default written out, quantities in bytes."""
    return spec.model_dump(mode="json")


def revision_of(spec: ModelSpec) -> str:
    """Return 12 hexadecimal digits that differ where two canonical forms differ."""
    canonical = json.dumps(render_spec(spec), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
