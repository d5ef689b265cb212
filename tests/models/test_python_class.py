"""A user's class loads from wherever it is, and what is wrong with it is said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

from serve.errors import InvalidInput, LoadError, PredictionFailed
from serve.host import Host
from serve.models.base import LoadContext, Model, Signature, SteppedModel, TensorSpec
from serve.models.python_class import PythonClass
from serve.settings import Settings
from serve.spec import ModelSpec, PythonOptions

DOUBLER = """
    from serve.models.base import Signature


    class Doubler:
        signature = Signature.of(
            {"x": "FP32 [-1, -1]: numbers"}, {"y": "FP32 [-1, -1]: their doubles"}, example={"x": [1.0, 2.0]}
        )

        def predict(self, batch):
            return [{"y": 2 * item["x"]} for item in batch]
"""


@pytest.fixture(autouse=True)
def restored_imports() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("user_model_", "shop")):
            del sys.modules[name]


def write(path: Path, code: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(code))
    return path


def load(source: Path, name: str = "Doubler", **arguments: Any) -> Any:
    model = PythonClass()
    model.load(
        LoadContext(
            folder=source if source.is_dir() else source.parent,
            file=source if source.is_file() else None,
            options=PythonOptions.model_validate({"class": name, "arguments": arguments}),
            device="cpu",
            dtype="float32",
            threads=1,
            max_batch_size=8,
            cache_dir=Path("/nonexistent"),
            progress=lambda what, done, total: None,
        )
    )
    return model


def host(base_dir: Path, source: str, name: str, **arguments: Any) -> Host:
    spec = ModelSpec.model_validate(
        {"name": "m", "task": "python", "source": source, "options": {"class": name, "arguments": arguments}}
    )
    return Host(spec, settings=Settings(), base_dir=base_dir)


def test_ten_lines_are_a_model(tmp_path: Path) -> None:
    model = load(write(tmp_path / "doubler.py", DOUBLER))
    assert isinstance(model, Model)
    (answer,) = model.predict([{"x": np.array([1.0, 2.5], np.float32)}])
    assert answer["y"].tolist() == [2.0, 5.0]
    assert model.signature.inputs == (TensorSpec("x", "FP32", (-1, -1), "numbers"),)
    assert not hasattr(model, "prepare")
    assert not hasattr(model, "stream")


async def test_a_host_serves_it_from_a_file(tmp_path: Path) -> None:
    write(tmp_path / "doubler.py", DOUBLER)
    hosted = host(tmp_path, "file:./doubler.py", "Doubler")
    await hosted.load()
    try:
        (answer,) = await hosted.infer([{"x": np.array([3.0], np.float32)}])
        assert answer["y"].tolist() == [6.0]
    finally:
        await hosted.close()


def test_an_example_is_what_a_request_would_bring(tmp_path: Path) -> None:
    code = """
    from serve.models.base import Signature

    class Doubler:
        signature = Signature.of(
            {"x": "FP16 [-1, -1]", "n": "INT64 [-1]", "flag": "BOOL [-1]", "text": "BYTES [-1]"},
            {"y": "FP32 [-1]"},
            example={"x": [1, 2], "n": 3, "flag": True, "text": "word"},
        )
        def predict(self, batch): pass
    """
    example = load(write(tmp_path / "doubler.py", code)).signature.example
    assert (example["x"].dtype, example["x"].tolist()) == (np.float16, [1.0, 2.0])
    assert [type(example[name]) for name in ("n", "flag", "text")] == [np.int64, np.bool_, bytes]


async def test_a_host_serves_it_from_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "shop" / "__init__.py", "")
    write(tmp_path / "shop" / "rates.py", "FACTOR = 3")
    write(
        tmp_path / "shop" / "model.py",
        """
        from serve.models.base import Signature
        from .rates import FACTOR

        class Priced:
            signature = Signature.of({"x": "INT64 [-1]"}, {"y": "INT64 [-1]"})

            def __init__(self, plus: int = 0) -> None:
                self.plus = plus

            def predict(self, batch):
                return [{"y": FACTOR * item["x"] + self.plus} for item in batch]
        """,
    )
    monkeypatch.syspath_prepend(tmp_path)
    hosted = host(tmp_path, "package:shop/model.py", "Priced", plus=1)
    await hosted.load()
    try:
        assert await hosted.infer([{"x": np.int64(2)}]) == [{"y": 7}]
    finally:
        await hosted.close()


async def test_what_the_class_raises_is_reported_and_its_neighbours_are_answered(tmp_path: Path) -> None:
    write(
        tmp_path / "picky.py",
        """
        from serve.models.base import Signature
        from serve.errors import InvalidInput

        class Picky:
            signature = Signature.of({"x": "INT64 [-1]"}, {"y": "FP64 [-1]"})

            def predict(self, batch):
                return [{"y": self.answer(int(item["x"]))} for item in batch]

            def answer(self, x):
                if x < 0:
                    raise InvalidInput("negative", place="x")
                return 1 / x
        """,
    )
    hosted = host(tmp_path, "file:picky.py", "Picky")
    await hosted.load()
    try:
        with pytest.raises(PredictionFailed, match="ZeroDivisionError: division by zero"):
            await hosted.infer([{"x": np.int64(0)}])
        with pytest.raises(InvalidInput, match="negative"):
            await hosted.infer([{"x": np.int64(-1)}])
        assert await hosted.infer([{"x": np.int64(2)}]) == [{"y": 0.5}]
    finally:
        await hosted.close()


def test_the_documented_class_takes_ten_lines_and_is_a_model(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "write-a-model.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 10
    model = load(write(tmp_path / "doubler.py", code))
    assert model.predict([{"x": np.array([1.0, 2.5], np.float32)}])[0]["y"].tolist() == [2.0, 5.0]


def test_load_prepare_cost_stream_and_close_are_the_users(tmp_path: Path) -> None:
    path = write(
        tmp_path / "full.py",
        """
        from serve.models.base import Signature

        class Full:
            padded = True

            def __init__(self, greeting, *, marks=1):
                self.greeting, self.marks = greeting, marks

            def load(self, context):
                self.weights = (context.folder / "names.txt").read_text().split()
                self.signature = Signature.of({"n": "INT64 [-1]"}, {"text": "BYTES [-1]"})

            def prepare(self, item):
                return self.weights[int(item["n"])]

            def cost(self, prepared):
                return len(prepared)

            def predict(self, batch):
                return [{"text": f"{self.greeting} {name}" + self.marks * "!"} for name in batch]

            def stream(self, prepared):
                yield {"text": prepared}

            def close(self):
                self.weights = None
        """,
    )
    (tmp_path / "names.txt").write_text("Ada Grace")
    model = load(path, "Full", greeting="Hello", marks=2)
    prepared = model.prepare({"n": np.int64(1)})
    assert (prepared, model.cost(prepared), model.padded) == ("Grace", 5, True)
    assert model.predict([prepared]) == [{"text": "Hello Grace!!"}]
    assert list(model.stream(prepared)) == [{"text": "Grace"}]
    assert model.signature.outputs[0].name == "text"
    model.close()
    with pytest.raises(TypeError):
        model.prepare({"n": np.int64(1)})


def test_a_class_that_steps_is_a_stepped_model(tmp_path: Path) -> None:
    path = write(
        tmp_path / "steps.py",
        """
        from serve.models.base import Signature, Step

        class Counter:
            slots = 2
            signature = Signature.of({"n": "INT64 [-1]"}, {"n": "INT64 [-1]"})
            def prepare(self, item): return int(item["n"])
            def admit(self, prepared): self.left = prepared; return 0
            def step(self): self.left -= 1; return [Step(0, {"n": self.left}, done=self.left == 0)]
            def release(self, key): pass
        """,
    )
    model = load(path, "Counter")
    assert isinstance(model, SteppedModel)
    assert not hasattr(model, "predict")
    model.admit(model.prepare({"n": 2}))
    assert [step.done for _ in range(2) for step in model.step()] == [False, True]


def test_a_folder_names_the_file_with_the_class(tmp_path: Path) -> None:
    write(tmp_path / "models" / "doubler.py", DOUBLER)
    assert load(tmp_path, "models.doubler.Doubler").predict([{"x": np.float32(1)}])[0]["y"] == 2
    assert load(tmp_path / "models", "doubler.Doubler").predict([{"x": np.float32(1)}])[0]["y"] == 2


def test_a_file_imports_what_stands_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "shop_helpers.py", "def double(x): return 2 * x")
    write(tmp_path / "a.py", "from shop_helpers import double\n" + dedent(DOUBLER).replace("2 * item", "double(item"))
    (tmp_path / "a.py").write_text((tmp_path / "a.py").read_text().replace('["x"]}', '["x"])}'))
    assert load(tmp_path / "a.py").predict([{"x": np.float32(1)}])[0]["y"] == 2


def test_a_file_may_be_called_like_a_module_of_the_standard_library(tmp_path: Path) -> None:
    model = load(write(tmp_path / "json.py", DOUBLER))
    assert model.predict([{"x": np.float32(1)}])[0]["y"] == 2
    assert hasattr(sys.modules["json"], "loads")


def test_a_file_changed_is_loaded_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "doubler.py", DOUBLER)
    load(path)
    write(path, DOUBLER.replace("2 *", "20 *"))
    assert load(path).predict([{"x": np.float32(1)}])[0]["y"] == 20


BROKEN = {
    "a missing class": ("class Dubler: pass", r"has no class 'Doubler'; did you mean 'Dubler'\?"),
    "no class near": ("class Shop: pass\nclass Cart: pass", r"has no class 'Doubler'; its classes are Shop, Cart"),
    "no class at all": ("x = 1", r"has no class 'Doubler'; it defines none"),
    "no class but a function": ("def Doubler(): pass", "'Doubler' in .* is no class but a function"),
    "a syntax error": ("class Doubler(:", r"its import failed: SyntaxError: .*line 1"),
    "a failing import": ("import nonexistent_package", "ModuleNotFoundError: No module named 'nonexistent_package'"),
    "a line that raises": ("x = 1\ny = x / 0", r"ZeroDivisionError: division by zero \(line 2: y = x / 0\)"),
    "an exit": ("import sys; sys.exit(3)", "its import failed: SystemExit: 3"),
    "no predict": ("class Doubler: signature = None", r"Doubler has no method predict\(self, batch\)"),
    "a misspelt predict": (
        "class Doubler:\n    def predicts(self, batch): pass",
        r"no method predict\(self, batch\); did you mean 'predicts' to be it\?",
    ),
    "a predict without the batch": ("class Doubler:\n    def predict(self): pass", "one argument is what it gets"),
    "a predict that is async": (
        "class Doubler:\n    async def predict(self, batch): pass",
        "is async; models run on a",
    ),
    "a predict that is no method": ("class Doubler:\n    predict = 3", "Doubler.predict is no method but a int"),
    "a load without the context": (
        "class Doubler:\n    def load(self): pass\n    def predict(self, batch): pass",
        r"Doubler.load takes \(\) after self; one argument",
    ),
    "no signature": (
        "class Doubler:\n    def predict(self, batch): pass",
        r"Doubler has no signature; .*Signature\.of",
    ),
    "a load that raises": (
        "class Doubler:\n    def load(self, context): self.missing\n    def predict(self, batch): pass",
        r"Doubler\.load failed: AttributeError: .*\(line 2: def load\(self, context\): self\.missing\)",
    ),
    "half a stepped model": (
        "class Doubler:\n    def admit(self, p): pass\n    def step(self): pass\n    def release(self, k): pass",
        "needs slots and prepare, too",
    ),
    "an __init__ that raises": (
        "class Doubler:\n    def __init__(self): raise ValueError('too small')",
        r"Doubler\(\) failed: ValueError: too small \(line 2",
    ),
    "an __init__ that wants more": (
        "class Doubler:\n    def __init__(self, factor): pass",
        r"options\.arguments do not fit Doubler\(factor\): missing a required argument: 'factor'; given is nothing",
    ),
}


@pytest.mark.parametrize(("code", "message"), BROKEN.values(), ids=BROKEN)
def test_a_class_that_is_no_model_does_not_load(code: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=message):
        load(write(tmp_path / "broken.py", code))


SIGNATURES = {
    "a dict": ("{'x': 'FP32'}", "signature is a dict; a serve.models.base.Signature is wanted"),
    "no outputs": (
        "Signature((TensorSpec('x', 'FP32', (-1,), ''),), ())",
        r"signature\.outputs is \(\); a tuple of one",
    ),
    "no tensors": ("Signature(('x',), ('y',))", r"signature\.inputs is \('x',\); a tuple of one TensorSpec"),
    "a datatype": (
        "Signature((TensorSpec('x', 'FLOAT32', (-1,), ''),), (TensorSpec('y', 'FP32', (-1,), ''),))",
        r"x has the datatype 'FLOAT32'; did you mean FP32\?",
    ),
    "no batch": (
        "Signature((TensorSpec('x', 'FP32', (3,), ''),), (TensorSpec('y', 'FP32', (-1,), ''),))",
        r"x has the shape \(3,\); .* -1, which is the batch",
    ),
    "a name twice": (
        "Signature((TensorSpec('x', 'FP32', (-1,), ''),) * 2, (TensorSpec('y', 'FP32', (-1,), ''),))",
        "names a tensor 'x'; names are text, and each is there once",
    ),
    "an example that lacks an input": (
        "Signature.of({'x': 'FP32 [-1]', 'z': 'FP32 [-1]'}, {'y': 'FP32 [-1]'}, example={'x': 1, 'w': 2})",
        "example lacks z",
    ),
    "an example that holds more": (
        "Signature.of({'x': 'FP32 [-1]'}, {'y': 'FP32 [-1]'}, example={'x': 1, 'w': 2})",
        "example holds w, which is no input",
    ),
    "an example of a whole batch": (
        "Signature.of({'x': 'FP32 [-1, 2]'}, {'y': 'FP32 [-1]'}, example={'x': [[1, 2]]})",
        r"x has the shape \(1, 2\); an example is one row, so it lacks the first dimension of \[-1, 2\]",
    ),
    "an example of another type": (
        "Signature.of({'x': 'FP32 [-1]'}, {'y': 'FP32 [-1]'}, example={'x': 'word'})",
        "x is no FP32: could not convert string to float",
    ),
    "a text without a shape": ("Signature.of({'x': 'FP32'}, {'y': 'FP32 [-1]'})", "tensor 'x' is 'FP32'; a datatype"),
    "a text with a wrong datatype": ("Signature.of({'x': 'F [-1]'}, {'y': 'FP32 [-1]'})", r"tensor 'x' is 'F \[-1\]'"),
}


@pytest.mark.parametrize(("expression", "message"), SIGNATURES.values(), ids=SIGNATURES)
def test_a_wrong_signature_does_not_load(expression: str, message: str, tmp_path: Path) -> None:
    code = f"""
    from serve.models.base import Signature, TensorSpec

    class Doubler:
        signature = {expression}
        def predict(self, batch): pass
    """
    with pytest.raises(LoadError, match=message):
        load(write(tmp_path / "broken.py", code))


def test_arguments_that_do_not_fit_do_not_load(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"options\.arguments do not fit Doubler\(\): .*'factor'; given is factor"):
        load(write(tmp_path / "doubler.py", DOUBLER), factor=2)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("doubler.txt", "Doubler", r"doubler\.txt; a Python file \(\.py\)"),
        ("doubler.py", "doubler.Doubler", "the source is a file already, so 'Doubler' is enough"),
        (".", "Doubler", r"the source is a folder; write the file as well.*; in the folder are doubler\.py"),
        (".", "dubler.Doubler", r"dubler\.py is not there; in the folder are doubler\.py"),
    ],
)
def test_a_source_that_does_not_lead_to_the_class_does_not_load(
    source: str, name: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "doubler.py", DOUBLER)
    write(tmp_path / "doubler.txt", DOUBLER)
    with pytest.raises(LoadError, match=message):
        load(tmp_path / source, name)


def test_torch_keeps_to_the_replicas_threads_where_a_file_imports_it(tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    path = write(tmp_path / "doubler.py", "import torch; torch.set_num_threads(2)\n" + dedent(DOUBLER))
    try:
        load(path)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_neither_torch_nor_anything_heavy_is_imported(tmp_path: Path) -> None:
    code = "import sys, serve.models.python_class; assert not {'torch', 'PIL', 'ray', 'fastapi'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensors_are_written_as_text() -> None:
    signature = Signature.of(
        {"image": "BYTES [-1] base64: a photograph", "size": "INT64[-1,2] optional"},
        {"y": "FP32 [-1, 3]: scores: best first"},
        parameters={"k": "how many"},
    )
    assert signature.inputs == (
        TensorSpec("image", "BYTES", (-1,), "a photograph", content="base64"),
        TensorSpec("size", "INT64", (-1, 2), "", optional=True),
    )
    assert signature.outputs == (TensorSpec("y", "FP32", (-1, 3), "scores: best first"),)
    assert (signature.parameters, signature.example) == ({"k": "how many"}, None)


@pytest.mark.parametrize(
    "text", ["", "FP32", "[-1]", "fp32 [-1]", "FP32 [-1", "FP32 [-2]", "FP32 [a]", "FP32 [-1] b64"]
)
def test_a_tensor_written_wrongly_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"a datatype .* and a shape are wanted"):
        Signature.of({"x": text}, {"y": "FP32 [-1]"})
