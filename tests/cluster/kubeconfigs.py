"""Kubeconfigs that are right and wrong, and what is said of those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def configuration(port: int, **changed: Any) -> dict[str, Any]:
    """Return a kubeconfig whose context `here` is an API server on this machine."""
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "shop"}}],
        **changed,
    }


_NO_CERTIFICATE = [{"name": "c", "cluster": {"server": "https://127.0.0.1:1", "certificate-authority": "/none.pem"}}]

#: What is in the file, None for no file, and what is said; `{path}` is the file's.
WRONG = [
    (None, "there is no kubeconfig {path}; set KUBECONFIG"),
    ("a: [1\nb: }", "the kubeconfig {path} is not YAML: "),
    ("", "the kubeconfig {path} cannot be used: "),
    ("hello", "the kubeconfig {path} cannot be used: "),
    ("\x80", "the kubeconfig {path} is not YAML: "),
    ("contexts: [{name: a}]", "the kubeconfig {path} lacks 'context'; "),
    (configuration(1, contexts=[]), "the kubeconfig {path} has no context 'here'; it has none"),
    (configuration(1, **{"current-context": ""}), "{path} has no current context; name one with --context: it has"),
    (configuration(1, clusters=[]), "the kubeconfig {path} cannot be used: "),
    (configuration(1, clusters=_NO_CERTIFICATE), "the kubeconfig {path} cannot be used: "),
]


def put(path: Path, written: str | dict[str, Any] | None) -> None:
    """Write a kubeconfig of `WRONG`."""
    if written is not None:
        path.write_text(written if isinstance(written, str) else yaml.safe_dump(written))
