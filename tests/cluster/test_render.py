"""Manifests of a declaration."""

from __future__ import annotations

import yaml

from serve.cli import main

MODEL = """models:
- name: a
  task: python
  source: file:/m.py
  description: "1e3"
  options: {class: M, arguments: {nothing: null}}
  resources: {memory: 1Gi}
  revision: null
- {name: b, task: python, source: 'file:/m.py', options: {class: M}}
"""


def test_a_manifest_holds_what_was_written_and_no_more(tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(MODEL)
    assert main(["render", "-f", str(tmp_path / "m.yaml"), "--namespace", "n"]) == 0
    printed = capsys.readouterr().out
    first, second = yaml.safe_load_all(printed)
    assert first == {
        "apiVersion": "roundhouse.dev/v1alpha1",
        "kind": "Model",
        "metadata": {"name": "a", "namespace": "n"},
        "spec": {
            "task": "python",
            "source": "file:/m.py",
            "description": "1e3",
            "options": {"class": "M", "arguments": {"nothing": None}},
            "resources": {"memory": "1Gi"},
        },
    }
    assert second["metadata"]["name"] == "b"
    assert '"1e3"' in printed


def test_a_declaration_that_a_cluster_could_not_serve_is_refused(tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(MODEL.replace("file:/m.py", "file:m.py"))
    assert main(["render", "-f", str(tmp_path / "m.yaml")]) == 1
    assert "absolute" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["render", "-f", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml" in capsys.readouterr().err
