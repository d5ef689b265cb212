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


def module_of(task: str) -> str:
    """Return the module that a task's models are in."""
    return TASKS[task].partition(":")[0]


def build(spec: ModelSpec) -> Any:
    """Return the unloaded model (a `Model` or a `SteppedModel`) of a spec's task."""
    module, _, name = TASKS[spec.task].partition(":")
    return getattr(import_module(module), name)()
