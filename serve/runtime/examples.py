"""One command a model that a person can paste, made from its task alone, so that it is known before the model is."""

from __future__ import annotations

from serve.spec import ModelSpec

_BODIES = {
    "text-embedding": ("v1/embeddings", '{"model": "NAME", "input": "The locomotive turns."}'),
    "text-generation": (
        "v1/chat/completions",
        '{"model": "NAME", "messages": [{"role": "user", "content": "What is a roundhouse?"}], "max_tokens": 60}',
    ),
    "forecast": (
        "infer",
        '{"inputs": [{"name": "series", "datatype": "FP32", "shape": [1, 8], "data": [1, 2, 3, 2, 1, 2, 3, 2]}]}',
    ),
}


def curl(spec: ModelSpec, base_url: str) -> str:
    """Return a curl command that the model answers."""
    url = f"{base_url}/v2/models/{spec.name}"
    if spec.task == "speech-to-text":
        return f"curl -s {url}/v1/audio/transcriptions -F model={spec.name} -F file=@speech.wav"
    if spec.task in ("image-classification", "voice-activity"):
        return (
            f"roundhouse predict {spec.name} @{'picture.jpg' if spec.task == 'image-classification' else 'speech.wav'}"
        )
    if spec.task not in _BODIES:
        return f"curl -s {url}"
    path, body = _BODIES[spec.task]
    return f"curl -s {url}/{path} -d '{body.replace('NAME', spec.name)}'"
