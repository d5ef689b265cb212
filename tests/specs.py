"""Hypothesis strategies of valid specs."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from serve.spec import COSTED_TASKS, OPTIONS, ModelSpec

numbers = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
names = st.from_regex(r"\A[a-z0-9]([-a-z0-9]{0,10}[a-z0-9])?\Z")


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return mappings with any of these keys."""
    return st.fixed_dictionaries({}, optional=fields)


TASK_OPTIONS = {
    "text-embedding": some(pooling=st.sampled_from(["mean", "cls"]), max_tokens=st.none() | st.integers(1, 512)),
    "text-generation": some(slots=st.integers(1, 64), chat_template=st.none() | texts),
    "image-classification": some(top_k=st.integers(1, 1000), labels=st.none() | texts),
    "speech-to-text": some(beam_size=st.integers(1, 16), language=texts),
    "forecast": some(max_context=st.integers(1, 10**6)),
    "voice-activity": some(threshold=st.floats(0.01, 0.99), max_audio_s=st.floats(0.1, 1e6)),
    "python": st.fixed_dictionaries({"class": texts, "arguments": st.dictionaries(texts, json_values, max_size=3)}),
}
VLLM_OPTIONS = st.fixed_dictionaries(
    {"engine": st.just("vllm")},
    optional={"slots": st.integers(1, 64), "enforce_eager": st.none() | st.booleans(), "quantization": st.none()},
)


@st.composite
def model_specs(draw: st.DrawFn) -> ModelSpec:
    """Draw a valid spec, with few keys or many; never a `file:` source, which would have to exist."""
    task = draw(st.sampled_from(sorted(OPTIONS)))
    scheme = draw(st.sampled_from(["package", "hf", "s3", "https"]))
    replicas = sorted(draw(st.lists(st.integers(1, 1000), min_size=2, max_size=2)))
    device, gpus = draw(st.sampled_from([("auto", 0), ("auto", 0.5), ("cpu", 0.0), ("cuda", 2)]))
    takes_vllm = task == "text-generation" and 0 < gpus <= 1
    fields: dict[str, Any] = {
        "name": draw(names),
        "task": task,
        "source": {"package": "package:a.b/c", "hf": "hf:o/n", "s3": "s3://b/p", "https": "https://h/f"}[scheme],
        "device": device,
        "description": draw(texts),
        "options": draw(TASK_OPTIONS[task] | VLLM_OPTIONS if takes_vllm else TASK_OPTIONS[task]),
        "scaling": {"min_replicas": replicas[0], "max_replicas": replicas[1]},
        "resources": {"gpus": gpus} | draw(some(memory=st.none() | st.integers(1, 2**60), cpus=st.floats(0.01, 1024))),
        "batching": draw(some(max_batch_size=st.integers(1, 1024), max_wait_ms=st.floats(0, 60_000))),
    }
    shares = st.floats(0, 1, exclude_min=True, exclude_max=True)
    fields["objectives"] = draw(
        some(latency_ms=st.none() | st.floats(0.1, 60_000), latency_ratio=shares, availability=shares)
    )
    if task in COSTED_TASKS:
        fields["batching"]["max_batch_cost"] = draw(st.none() | st.integers(1, 10**6))
    fields |= {"sha256": "ab" * 32} if scheme == "https" else {}
    fields |= {"revision": draw(st.sampled_from(["main", "1e5", "0123", "yes"]))} if scheme == "hf" else {}
    return ModelSpec.model_validate(fields)
