"""A user's class is hosted as it is, and what is wrong with it is told in its own terms."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.errors import LoadError, PredictionFailed
from serve.host import Host
from serve.settings import Settings
from serve.spec import ModelSpec

HEAD = "from serve.models.base import Signature, TensorSpec\n"
DOUBLE = (
    HEAD
    + """
class Double:
    signature = Signature(
        inputs=(TensorSpec("x", "FP32", (-1,), "a number"),),
        outputs=(TensorSpec("y", "FP32", (-1,), "twice the number"),),
    )

    def predict(self, batch):
        return [{"y": item["x"] * 2} for item in batch]
"""
)


def host(folder: Path, code: str, class_name: str = "Double", **options: object) -> Host:
    (folder / "model.py").write_text(code)
    spec = ModelSpec(name="own", task="python", source="file:model.py", options={"class": class_name, **options})
    return Host(spec, settings=Settings(cache_dir=folder / "cache"), base_dir=folder)


async def test_ten_lines_are_a_model(tmp_path: Path):
    hosted = host(tmp_path, DOUBLE)
    await hosted.load()
    assert await hosted.infer([{"x": 2.0}, {"x": 3.0}]) == [{"y": 4.0}, {"y": 6.0}]
    assert not hosted.streams
    await hosted.close()


async def test_arguments_and_the_files_beside_it_reach_the_class(tmp_path: Path):
    (tmp_path / "beside.py").write_text("OFFSET = 100\n")
    code = (
        "from beside import OFFSET\n"
        + HEAD
        + """
class Add:
    signature = Signature(inputs=(TensorSpec("x", "FP32", (-1,), ""),), outputs=(TensorSpec("y", "FP32", (-1,), ""),))

    def __init__(self, more):
        self.more = more

    def load(self, context):
        self.more += OFFSET

    def prepare(self, item):
        return item["x"] + 1

    def predict(self, batch):
        return [{"y": x + self.more} for x in batch]
"""
    )
    hosted = host(tmp_path, code, "Add", arguments={"more": 10})
    await hosted.load()
    assert await hosted.infer([{"x": 1.0}]) == [{"y": 112.0}]
    await hosted.close()


async def test_a_generator_streams(tmp_path: Path):
    code = DOUBLE + "\n    def stream(self, item):\n        yield {'y': 1}\n        yield {'y': 2}\n"
    hosted = host(tmp_path, code)
    await hosted.load()
    assert hosted.streams
    assert [part async for part in hosted.stream({"x": 1.0})] == [{"y": 1}, {"y": 2}]
    await hosted.close()


async def test_what_predict_raises_is_told_without_a_traceback(tmp_path: Path):
    hosted = host(tmp_path, DOUBLE.replace('item["x"] * 2', 'item["x"] / 0'))
    await hosted.load()
    with pytest.raises(PredictionFailed, match="ZeroDivisionError"):
        await hosted.infer([{"x": 1}])
    await hosted.close()


@pytest.mark.parametrize(
    ("code", "class_name", "told"),
    [
        (DOUBLE, "Duoble", "has no class 'Duoble'; it has Double"),
        ("", "Double", "it has no class"),
        ("import nothing_of_this_name\n", "Double", r"model.py: ModuleNotFoundError: .* \(line 1 of model.py\)"),
        ("class Double(:\n", "Double", "model.py: SyntaxError"),
        (DOUBLE.replace("def predict", "def foretell"), "Double", r"Double has no method predict\(batch\)"),
        ("class Double:\n    def predict(self, batch): ...\n", "Double", "Double has no signature"),
        ("class Double:\n    signature = {}\n    def predict(self, batch): ...\n", "Double", "signature is a dict"),
        (DOUBLE + "\n    def __init__(self, size): ...\n", "Double", "missing 1 required positional argument: 'size'"),
        (DOUBLE + "\n    def load(self, context):\n        raise ValueError('no weights')\n", "Double", "no weights"),
    ],
)
async def test_what_is_wrong_with_a_class_is_named(tmp_path: Path, code: str, class_name: str, told: str):
    hosted = host(tmp_path, code, class_name)
    with pytest.raises(LoadError, match=told):
        await hosted.load()
    assert hosted.phase == "failed"


async def test_a_folder_is_no_python_model(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    spec = ModelSpec(name="own", task="python", source="file:folder", options={"class": "X"})
    with pytest.raises(LoadError, match="names one file"):
        await Host(spec, settings=Settings(), base_dir=tmp_path).load()
