"""One file a task, imported only when a model of that task is built; the only home of torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from serve.spec import ModelSpec

#: task -> module:class; a class is constructed without arguments and loads from its LoadContext.
TASKS = {
    "text-embedding": "serve.models.text_embedding:TextEmbedding",
    "text-generation": "serve.models.text_generation:TextGeneration",
    "image-classification": "serve.models.image_classification:ImageClassification",
    "speech-to-text": "serve.models.speech_to_text:SpeechToText",
    "forecast": "serve.models.forecast:Forecast",
    "voice-activity": "serve.models.voice_activity:VoiceActivity",
    "python": "serve.models.python_class:PythonClass",
}

#: Value of a task's option `engine` -> what takes the place of the task's own class.
ENGINES = {"vllm": "serve.models.vllm_engine:VllmGeneration"}


def module_of(spec: ModelSpec) -> str:
    """Return the module that a model's class is in."""
    return _place(spec)[0]


def build(spec: ModelSpec) -> Any:
    """Return the unloaded model (a `Model` or a `SteppedModel`) of a spec's task."""
    module, name = _place(spec)
    return getattr(import_module(module), name)()


def _place(spec: ModelSpec) -> tuple[str, str]:
    module, _, name = ENGINES.get(spec.options.get("engine", ""), TASKS[spec.task]).partition(":")
    return module, name
