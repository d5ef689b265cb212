"""The README names what exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from serve.cli import COMMANDS
from serve.declaration import load_declaration

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_it_lists_every_command():
    assert [command.name for command in COMMANDS if f"`roundhouse {command.name}" not in README] == []


def test_its_models_are_those_of_the_catalog():
    declared = {(spec.name, spec.task) for spec in load_declaration(ROOT / "models.yaml").models}
    told = set(re.findall(r"^\| (\w+) \| ([a-z-]+) \| ", README, flags=re.M)) - {("model", "task")}
    assert told == declared


def test_its_targets_are_in_the_makefile():
    targets = set(re.findall(r"^make (\w+)", README, flags=re.M)) | set(re.findall(r"`make (\w+)`", README))
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


def test_the_pythons_it_names_are_those_that_are_supported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.14"
    assert "3.11 to 3.13" in README
