"""A real request to every model of a platform, so that an installation can be told to work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx

_POLL_S = 2.0
_REQUEST_S = 120.0


def verify(url: str, *, timeout_s: float, say: Callable[[str], None]) -> bool:
    """Wait until no model is on its way, then send each the request that its own documents show; pure HTTP.

    Args:
        url: Of the inference service.
        timeout_s: How long the platform and its models may take to start.

    Returns:
        Whether the gateway answers, there are models, and every one did.
    """
    with httpx.Client(base_url=url, timeout=_REQUEST_S) as client:
        models = _settled(client, ends=time.monotonic() + timeout_s, say=say)
        if models is None:
            say(f"{url} did not answer within {timeout_s:g} s, or models were still on their way")
            return False
        answered = [_answers(client, model, say) for model in models]
    if not answered:
        say(
            "no model is served, so nothing was tried; declare one, or see why those that there are were not Accepted:"
            " kubectl describe models.roundhouse.dev"
        )
        return False
    say(f"{sum(answered)} of {len(answered)} models answer; one that is not Accepted is not among them")
    return all(answered)


def _settled(client: httpx.Client, *, ends: float, say: Callable[[str], None]) -> list[dict[str, Any]] | None:
    told = ""
    while time.monotonic() < ends:
        try:
            models = client.post("/v2/repository/index").raise_for_status().json()
            waiting = [
                f"{model['name']} {model['phase']}" for model in models if model["phase"] not in ("ready", "failed")
            ]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            line = f"waiting for the gateway: {type(error).__name__}: {error}"
        else:
            if not waiting:
                return list(models)
            line = f"waiting for {', '.join(waiting)}"
        if line != told:
            told = line
            say(line)
        time.sleep(_POLL_S)
    return None


def _answers(client: httpx.Client, model: dict[str, Any], say: Callable[[str], None]) -> bool:
    name = model["name"]
    if model["phase"] == "failed":
        say(f"{name}: failed: {model['message']}")
        return False
    try:
        document = client.get(f"/v2/models/{name}/openapi.json").raise_for_status().json()
        content = document["paths"]["/infer"]["post"]["requestBody"]["content"]["application/json"]
        example = content["example"]
        began = time.monotonic()
        response = client.post(f"/v2/models/{name}/infer", json=example)
        took_s = time.monotonic() - began
        if response.status_code != 200:
            say(f"{name}: {response.status_code} {response.text[:300]}")
            return False
        outputs = ", ".join(f"{tensor['name']} {tensor['shape']}" for tensor in response.json()["outputs"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        say(f"{name}: does not answer as its documents say: {type(error).__name__}: {error}")
        return False
    say(f"{name}: {outputs} in {took_s * 1000:.0f} ms")
    return True
