"""What a span tells of a model of language, in OpenTelemetry's words (semantic conventions for generative AI)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve.api.openai_surface import TextRequest

_ASKED = ("max_tokens", "temperature", "top_p", "seed")


def text_details(
    operation: str, model: str, request: TextRequest, results: Sequence[Mapping[str, Any]], usage: Mapping[str, int]
) -> dict[str, Any]:
    """Return the attributes of text that was generated.

    Args:
        operation: `chat` or `text_completion`.
        results: One a choice that ended, with `finish_reason`.
        usage: As the answer tells it.
    """
    asked = request.items[0].get("parameters", {})
    details = _common(operation, model)
    details |= {f"gen_ai.request.{name}": asked[name] for name in _ASKED if asked.get(name) is not None}
    if len(request.items) > 1:
        details["gen_ai.request.choice.count"] = len(request.items)
    details["gen_ai.response.finish_reasons"] = tuple(str(result["finish_reason"]) for result in results)
    details["gen_ai.usage.input_tokens"] = usage["prompt_tokens"]
    details["gen_ai.usage.output_tokens"] = usage["completion_tokens"]
    return details


def embedding_details(model: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the attributes of texts that were embedded."""
    tokens = sum(int(result["token_count"]) for result in results)
    return _common("embeddings", model) | {"gen_ai.usage.input_tokens": tokens}


def _common(operation: str, model: str) -> dict[str, Any]:
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "roundhouse",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
    }
