"""What a cluster needs around the chart is valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

FILES = sorted((Path(__file__).parents[2] / "k8s").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_document_says_what_it_is(path):
    for document in yaml.safe_load_all(path.read_text()):
        assert document["apiVersion"]
        assert document["kind"]


def test_kind_forwards_the_port_that_its_comment_names():
    (path,) = [path for path in FILES if path.parent.name == "kind"]
    (port,) = yaml.safe_load(path.read_text())["nodes"][0]["extraPortMappings"]
    assert f"service.nodePort={port['containerPort']}:" in path.read_text()
    assert f"http://127.0.0.1:{port['hostPort']}" in path.read_text()
