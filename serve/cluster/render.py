"""Model manifests of a declaration, so that what runs on a laptop can be applied to a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from serve.cluster.crd import GROUP, KIND, VERSION
from serve.declaration import parse_declaration, read_declaration
from serve.spec import ModelSpec
from serve.yaml_tree import read_tree


def read_models(path: Path) -> tuple[tuple[ModelSpec, ...], list[dict[str, Any]]]:
    """Return a declaration's specs, and each model as it is written.

    Raises:
        InvalidDeclaration: The file cannot be read, or a cluster could not serve what it declares.
    """
    data = read_declaration(path)
    specs = parse_declaration(data, path=path, base_dir=None).models
    root, _ = read_tree(data, str(path))
    return specs, root.data()["models"] if root else []


def manifests(written: Sequence[Mapping[str, Any]], *, namespace: str | None = None) -> list[dict[str, Any]]:
    """Return a Model object for each model as it is written, with no key besides (pure)."""
    placed = {"namespace": namespace} if namespace else {}
    return [
        {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": KIND,
            "metadata": {"name": model["name"], **placed},
            "spec": _given({key: value for key, value in model.items() if key != "name"}),
        }
        for model in written
    ]


def _given(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping without nulls, which a Model cannot hold; a class's arguments keep theirs."""
    return {
        key: _given(value) if isinstance(value, dict) and key != "arguments" else value
        for key, value in part.items()
        if value is not None
    }


class _Dumper(yaml.SafeDumper):
    """Writes YAML that a reader of version 1.1 and one of 1.2 understand alike."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Such as 1e3 or 0o17: text in one version of YAML, a number in the other.
    style = '"' if text[:1] in "0123456789+-." else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(objects: Sequence[Mapping[str, Any]]) -> str:
    """Return objects as one YAML stream, a document each."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, explicit_start=True)
