"""The thousand labels are those of ImageNet, in its order."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.errors import LoadError
from serve.models.imagenet import load_labels


def test_imagenet_has_a_thousand_names_in_the_order_of_the_logits() -> None:
    labels = load_labels()
    assert len(labels) == 1000
    assert (labels[0], labels[281], labels[283], labels[388]) == ("tench", "tabby", "Persian cat", "giant panda")


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('["Katze", "Hündin"]', encoding="utf-8")
    assert load_labels(tmp_path / "labels.json") == ["Katze", "Hündin"]


@pytest.mark.parametrize("content", ["", "{", '{"a": "b"}', '["a", 1]', "3"])
def test_anything_but_a_list_of_strings_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(LoadError, match=r"labels\.json"):
        load_labels(tmp_path / "labels.json")
