"""What the command line asks of a cluster through the kubeconfig."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kubernetes import config as kube_config

from serve.cluster.kube import ApiUnavailable, Cluster, Missing, connect


def namespace_of(context: str) -> str:
    """Return the namespace that a context of the kubeconfig names, or `default`.

    Raises:
        ApiUnavailable: There is no such context.
    """
    try:
        contexts, current = kube_config.list_kube_config_contexts()
    except kube_config.ConfigException as error:
        raise ApiUnavailable(f"no way to a cluster: {error}") from error
    named = next((one for one in contexts if one["name"] == context), None) if context else current
    if named is None:
        known = ", ".join(one["name"] for one in contexts) or "none"
        raise ApiUnavailable(f"the kubeconfig has no context {context!r}; it has {known}")
    return str(named["context"].get("namespace") or "default")


def fetch_models(context: str, namespace: str | None) -> tuple[str, list[dict[str, Any]]]:
    """Return the namespace, and its Model objects.

    Raises:
        ApiUnavailable: There is no such context, or the API server refuses or does not answer.
    """
    found = namespace or namespace_of(context)
    try:
        return found, Cluster(connect(context), found).list_models()[0]
    except Missing as error:
        raise ApiUnavailable("the cluster has no Model resource; install the chart first") from error


def told(models: Sequence[Mapping[str, Any]]) -> str:
    """Return Models as a table for people."""
    rows = [("MODEL", "TASK", "PHASE", "REPLICAS", "MESSAGE")]
    for model in models:
        status = model.get("status", {})
        replicas = f"{status.get('readyReplicas', 0)}/{status.get('replicas', 0)}"
        name, task = model["metadata"]["name"], model["spec"]["task"]
        rows.append((name, task, status.get("phase", "Queued"), replicas, status.get("message", "")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def all_ready(models: Sequence[Mapping[str, Any]]) -> bool:
    """Tell whether every Model answers."""
    return all(model.get("status", {}).get("phase") == "Ready" for model in models)
