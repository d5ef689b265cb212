"""The schema of a model and of the platform, the same in models.yaml, the chart's values and the Model resource."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"

Task = Literal[
    "text-embedding",
    "text-generation",
    "image-classification",
    "speech-to-text",
    "forecast",
    "voice-activity",
    "python",
]

_SUFFIXES = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def parse_quantity(value: object) -> object:
    """Turn a Kubernetes quantity of bytes such as `512Mi` into an int; anything else is returned as it is."""
    if isinstance(value, str):
        digits = value.rstrip("kMGTi")
        suffix = value[len(digits) :]
        if suffix in _SUFFIXES and digits.replace(".", "", 1).isdigit():
            return int(float(digits) * _SUFFIXES[suffix])
        raise ValueError("is not a quantity of bytes such as 512Mi, 2Gi or 1000000")
    return value


Bytes = Annotated[int, BeforeValidator(parse_quantity), Field(ge=0)]


class Strict(BaseModel):
    """Base of every part of the schema: unknown keys fail, nothing is coerced silently, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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
    max_queue_bytes: Bytes = Field(
        default=256 * 2**20, ge=1, description="Bytes of the items that may wait."
    )


class Scaling(Strict):
    """How many replicas there are."""

    min_replicas: int = Field(default=1, ge=1, le=1000)
    max_replicas: int = Field(default=1, ge=1, le=1000)
    target_ongoing_requests: float = Field(
        default=16.0, gt=0, description="Requests in flight that one replica should have."
    )
    latency_target_ms: float | None = Field(
        default=None, gt=0, description="What the model promises; objectives and dashboards use it."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Scaling:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas})"
            )
        return self


class Resources(Strict):
    """What one replica takes."""

    cpus: float = Field(default=1.0, gt=0, le=1024, description="CPU cores, and compute threads.")
    gpus: float = Field(
        default=0.0, ge=0, le=64, description="GPUs; a fraction shares one GPU with other models."
    )
    memory: Bytes | None = Field(default=None, description="Bytes of main memory.")

    @model_validator(mode="after")
    def _whole_or_fraction(self) -> Resources:
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus ({self.gpus}) above 1 must be a whole number")
        return self


class Limits(Strict):
    """What one request may ask."""

    max_request_bytes: Bytes = Field(default=32 * 2**20, ge=1, description="Bytes of a body, decompressed.")
    max_items: int = Field(default=256, ge=1, description="Items in one request.")


class Empty(Strict):
    """No options."""


class EmbeddingOptions(Strict):
    """Options of `text-embedding`."""

    pooling: Literal["mean", "cls"] = "mean"
    normalize: bool = True
    max_tokens: int | None = Field(
        default=None, ge=1, description="Longest input; none takes the model's own limit."
    )
    truncate: bool = Field(
        default=True, description="Cut an input that is too long; otherwise it is refused."
    )


class GenerationOptions(Strict):
    """Options of `text-generation`."""

    slots: int = Field(default=8, ge=1, le=1024, description="Streams that are computed together.")
    context_tokens: int = Field(
        default=2048, ge=16, description="Prompt and answer of one stream together."
    )
    chat_template: str | None = Field(
        default=None, description="A Jinja template in place of the model's own."
    )
    default_max_tokens: int = Field(
        default=256, ge=1, description="Length of an answer whose request does not say."
    )


class ClassificationOptions(Strict):
    """Options of `image-classification`."""

    top_k: int = Field(default=5, ge=1, le=1000, description="Classes in an answer.")
    labels: str | None = Field(
        default=None, description="A JSON list of names in the source; none takes ImageNet's."
    )


class SpeechOptions(Strict):
    """Options of `speech-to-text`."""

    beam_size: int = Field(default=1, ge=1, le=16)
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

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)

    class_name: str = Field(alias="class", description="The class in the source's file.")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments of the class."
    )


OPTIONS: dict[str, type[Strict]] = {
    "text-embedding": EmbeddingOptions,
    "text-generation": GenerationOptions,
    "image-classification": ClassificationOptions,
    "speech-to-text": SpeechOptions,
    "forecast": ForecastOptions,
    "voice-activity": VoiceActivityOptions,
    "python": PythonOptions,
}


class ModelSpec(Strict):
    """One model, as declared."""

    name: str = Field(pattern=NAME_PATTERN, max_length=40)
    task: Task
    source: str = Field(
        description="package:, file:, hf:, s3:, gs: or https:; where the model's files are."
    )
    sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="Of the file that an https: source names."
    )
    revision: str | None = Field(
        default=None, min_length=1, max_length=128, description="Commit or tag of an hf: source."
    )
    description: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batching: Batching = Batching()
    scaling: Scaling = Scaling()
    resources: Resources = Resources()
    limits: Limits = Limits()
    deadline_ms: float = Field(
        default=60_000, gt=0, description="Longest time to an answer; a request may ask for less."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="The task's own options; see the task's schema."
    )

    def task_options(self) -> Strict:
        """Return `options` as the task's own schema; `check` has already proved that they fit."""
        return OPTIONS[self.task].model_validate(self.options)


class PlatformSpec(Strict):
    """A whole models.yaml."""

    models: list[ModelSpec] = Field(default_factory=list)
