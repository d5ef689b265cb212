"""A declaration gives its specs, or every problem at once with its place, value and likely fix; never anything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.declaration import Declaration, InvalidDeclaration, load_declaration, parse_declaration
from serve.errors import SpecError
from serve.spec import ModelSpec, render_spec
from serve.yaml_tree import MAX_BYTES, MAX_DEPTH, Problem
from tests.specs import model_specs, texts

HEAD = "models:\n  - name: a\n    task: text-embedding\n    source: package:a\n"


def parse(text: str | bytes, folder: Path = Path("/nowhere")) -> Declaration:
    data = text.encode() if isinstance(text, str) else text
    return parse_declaration(data, path=Path("models.yaml"), base_dir=folder)


def problems_of(text: str | bytes, folder: Path = Path("/nowhere")) -> tuple[Problem, ...]:
    with pytest.raises(InvalidDeclaration) as caught:
        parse(text, folder)
    return caught.value.problems


def only(text: str | bytes) -> Problem:
    (problem,) = problems_of(text)
    return problem


def said(text: str | bytes) -> list[str]:
    return [str(problem) for problem in problems_of(text)]


def test_the_default_catalog_is_right():
    declaration = load_declaration(Path(__file__).parent.parent / "models.yaml")
    assert [spec.name for spec in declaration.models] == [
        "minilm", "smollm2", "efficientnet", "whisper", "forecaster", "vad",
    ]  # fmt: skip


def test_a_problem_has_file_place_path_value_and_suggestion():
    problem = only(HEAD + "    batching: {max_batchsize: 4}\n")
    assert problem == Problem(
        "models.yaml", 5, 16, "models[0].batching.max_batchsize", "unknown key", 4, "max_batch_size"
    )
    assert str(problem) == (
        "models.yaml:5:16: models[0].batching.max_batchsize: unknown key; did you mean max_batch_size?"
    )


@pytest.mark.parametrize(
    ("line", "path", "message", "suggestion"),
    [
        # keys
        ("gpus: 1", "gpus", "unknown key", "resources.gpus"),
        ("maxReplicas: 2", "maxReplicas", "unknown key", "scaling.max_replicas"),
        ("pooling: cls", "pooling", "unknown key", "options.pooling"),
        ("qqqq: 1", "qqqq", "unknown key", None),
        ("options: {normalise: true}", "options.normalise", "unknown key", "normalize"),
        ("scaling: {maxReplicas: 1}", "scaling.maxReplicas", "unknown key", "max_replicas"),
        ('"x y": 1', '["x y"]', "unknown key", None),
        # types
        ('batching: {max_batch_size: "4"}', "batching.max_batch_size", "the text '4' where a whole number", "4"),
        ("batching: {max_batch_size: 4.0}", "batching.max_batch_size", "the number 4.0 where a whole number", "4"),
        ("batching: {max_wait_ms: soon}", "batching.max_wait_ms", "the text 'soon' where a number belongs", None),
        ("options: {truncate: 1}", "options.truncate", "the number 1 where true or false belongs", "true"),
        ("description: 1.10", "description", "the number 1.10 where text belongs", '"1.10"'),
        ("description: true", "description", "true where text belongs", '"true"'),
        ("batching: 4", "batching", "the number 4 where a mapping belongs", None),
        ("batching: [4]", "batching", "a list where a mapping belongs", None),
        ("batching:", "batching", "nothing where a mapping belongs", None),
        ("options: []", "options", "a list where a mapping belongs", None),
        # values
        ("device: gpu", "device", "'gpu' is not one of auto, cpu, cuda", "cuda"),
        ("dtype: bf16", "dtype", "'bf16' is not one of auto, float32, bfloat16, float16", "bfloat16"),
        ("options: {pooling: Mean}", "options.pooling", "'Mean' is not one of mean, cls", "mean"),
        ("batching: {max_batch_size: 0}", "batching.max_batch_size", "0 is below the least, 1", None),
        ("scaling: {max_replicas: 1001}", "scaling.max_replicas", "1001 is above the most, 1000", None),
        ("deadline_ms: 0", "deadline_ms", "0 is not above 0", None),
        ("resources: {memory: 2GB}", "resources.memory", "'2GB' is not a whole quantity", "2G"),
        ("resources: {gpus: 1.5}", "resources.gpus", "1.5 is above 1 and not whole", "2"),
        # what is a number to one YAML reader and not to another
        ("resources: {cpus: .nan}", "resources.cpus", ".nan is not a finite number", None),
        ("resources: {cpus: -.INF}", "resources.cpus", "-.INF is not a finite number", None),
        ("resources: {cpus: 1e999}", "resources.cpus", "1e999 is too large a number", None),
        ("options: {normalize: yes}", "options.normalize", "yes is text to some YAML readers", 'true or "yes"'),
        ("description: off", "description", "off is text to some YAML readers", 'false or "off"'),
        ("batching: {max_batch_size: 010}", "batching.max_batch_size", "010 is a different value", '10 or "010"'),
        ("batching: {max_batch_size: 1_0}", "batching.max_batch_size", "1_0 is a different value", '10 or "1_0"'),
        ("batching: {max_batch_size: !!int 4}", "batching.max_batch_size", "tags have no place here", None),
        # between fields
        ("scaling: {min_replicas: 2}", "scaling.max_replicas", "1 is below min_replicas, 2", None),
        ("batching: {max_queue: 1, max_batch_size: 2}", "batching.max_batch_size", "2 is above max_queue, 1", None),
        ("device: cuda", "device", "cuda takes a GPU and resources.gpus is 0", None),
        ("sha256: " + "a" * 64, "sha256", "only an https: source takes sha256", None),
        ("revision: main", "revision", "only an hf: source takes revision", None),
        # mappings
        ("task: python", "task", "key is given twice in one mapping, first on line 3", None),
        ("<<: {device: cpu}", '["<<"]', "merge keys are not read", None),
        ("device: *cpu", "device", "*cpu is not defined above", None),
        ("options: &o {max_tokens: *o}", "options.max_tokens", "*o holds itself", None),
        ("? [a]\n    : 1", "", "a list or a mapping cannot be a key", None),
    ],
)  # fmt: skip
def test_one_wrong_line_is_one_problem(line: str, path: str, message: str, suggestion: str | None):
    problem = only(HEAD + f"    {line}\n")
    assert problem.line == 5
    assert problem.path == ("models[0]" + (path if path.startswith("[") else f".{path}") if path else "models[0]")
    assert problem.message.startswith(message)
    assert problem.suggestion == suggestion


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (
            ["options: {engine: vllm}"],
            "5:23: models[0].options.engine: vllm computes on one GPU and resources.gpus is 0",
        ),
        (
            ["device: cpu", "options: {engine: vllm}"],
            "6:23: models[0].options.engine: vllm computes on a GPU and device is cpu; leave device out",
        ),
        (
            ["resources: {gpus: 2}", "options: {engine: vllm}"],
            "6:23: models[0].options.engine: vllm computes on one GPU and resources.gpus is 2; give it 1 or a fraction",
        ),
        (
            ["options: {slots: 4, quantization: fp8_per_block}"],
            "5:39: models[0].options.quantization: is read by engine: vllm alone; set that, or leave this out",
        ),
        (
            ["options: {engine: vlm, enforce_eager: true}"],
            "5:23: models[0].options.engine: 'vlm' is not one of roundhouse, vllm; did you mean vllm?",
        ),
        (["resources: {gpus: 1}", "options: {engine: vllm, tensor_parallel_size: 2}"], "6:29: models[0].options.tens"),
    ],
)
def test_an_engine_says_what_it_wants(lines: list[str], told: str):
    text = HEAD.replace("embedding", "generation") + "".join(f"    {line}\n" for line in lines)
    (found,) = said(text)
    assert found.startswith(f"models.yaml:{told}")


@pytest.mark.parametrize(
    ("source", "message", "suggestion"),
    [
        ("minilm", "does not begin with one of package:, file:", None),
        ("./minilm", "does not begin with one of", "file:./minilm"),
        ("http://host/x", "does not begin with one of", "https://host/x"),
        ("s3:bucket", "is not of the form s3://BUCKET/PREFIX", None),
        ("https://host/x", "an https: source takes sha256", None),
        ("file:nowhere", "does not exist", None),
    ],
)
def test_a_wrong_source_says_what_a_source_is(source: str, message: str, suggestion: str | None):
    problem = only(HEAD.replace("package:a", source))
    assert (problem.line, problem.column, problem.path) == (4, 13, "models[0].source")
    assert message in problem.message
    assert problem.suggestion == suggestion


def test_a_file_source_is_looked_for_beside_the_declaration(tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    path = tmp_path / "models.yaml"
    path.write_text(HEAD.replace("package:a", "file:model.safetensors"))
    declaration = load_declaration(path)
    assert (declaration.base_dir, declaration.path) == (tmp_path.resolve(), path)

    path.write_text(HEAD.replace("package:a", "file:model.safetensor"))
    with pytest.raises(InvalidDeclaration, match=r"does not exist; did you mean file:model\.safetensors\?"):
        load_declaration(path)


EVERYTHING = """\
models:
  - name: My_Model
    task: text-embeding
    source: package:x
    batching: {max_queue: 4, max_batch_size: 8, max_wait: 1}
  - name: dup
    task: text-embedding
    source: http://x/y
    options: {pooling: max, normalise: yes}
    scaling: {min_replicas: 3}
    resources: {cpus: .nan, memory: 2GB}
    description: "a: b
  - name: dup
    task: python
    source: file:nowhere
    sha256: ABC
    device: gpu
    device: cpu
    batching:
    limits: {maxItems: 010}
    deadline_ms: "60000"
  - task: forecast
    source: https://a.b/c
    name: 1.10
    revision: main
    batching
      max_batch_size: 1
    scaling: [1, 2
  - source: package:y
extra: 1
"""


def test_no_problem_hides_another():
    found = [(p.line, p.path, p.message.split("; ")[0][:24]) for p in problems_of(EVERYTHING)]
    assert found == [
        (2, "models[0].name", "'My_Model' takes small l"),
        (3, "models[0].task", "'text-embeding' is not o"),
        (5, "models[0].batching.max_batch_size", "8 is above max_queue, 4"),
        (5, "models[0].batching.max_wait", "unknown key"),
        (8, "models[1].source", "'http://x/y' does not be"),
        (9, "models[1].options.pooling", "'max' is not one of mean"),
        (9, "models[1].options.normalise", "unknown key"),
        (9, "models[1].options.normalise", "yes is text to some YAML"),
        (10, "models[1].scaling.max_replicas", "1 is below min_replicas,"),
        (11, "models[1].resources.cpus", ".nan is not a finite num"),
        (11, "models[1].resources.memory", "'2GB' is not a whole qua"),
        (12, "", "the quotation mark is no"),
        (13, "models[2].options.class", "the key is required and "),
        (13, "models[2].name", "'dup' is already the nam"),
        (15, "models[2].source", "'/nowhere/nowhere' does "),
        (16, "models[2].sha256", "'ABC' is not 64 hexadeci"),
        (16, "models[2].sha256", "only an https: source ta"),
        (17, "models[2].device", "'gpu' is not one of auto"),
        (18, "models[2].device", "key is given twice in on"),
        (19, "models[2].batching", "nothing where a mapping "),
        (20, "models[2].limits.maxItems", "unknown key"),
        (20, "models[2].limits.maxItems", "010 is a different value"),
        (21, "models[2].deadline_ms", "the text '60000' where a"),
        (23, "models[3].source", "an https: source takes s"),
        (24, "models[3].name", "the number 1.10 where te"),
        (25, "models[3].revision", "only an hf: source takes"),
        (26, "", "no colon after the key"),
        (28, "", "'[' is not closed, or a "),
        (29, "models[4].name", "the key is required and "),
        (29, "models[4].task", "the key is required and "),
        (30, "extra", "unknown key"),
    ]


def test_two_models_of_one_name_name_both_lines():
    second = "  - name: a\n    task: forecast\n    source: package:b\n"
    problem = only(HEAD + second)
    assert str(problem) == "models.yaml:5:11: models[1].name: 'a' is already the name of models[0] on line 2"


@pytest.mark.parametrize(
    ("text", "said_so"),
    [
        (b"", "models.yaml:1:1: is empty; begin with `models:` and a list below it"),
        (b"# only a comment\n", "models.yaml:1:1: is empty; begin with `models:` and a list below it"),
        (b"---\n\n    ", "models.yaml:1:1: is empty; begin with `models:` and a list below it"),
        (b"~", "models.yaml:1:1: nothing where the mapping `models:` belongs"),
        (b"- a\n", "models.yaml:1:1: a list where the mapping `models:` belongs"),
        (b"hello\n", "models.yaml:1:1: the text 'hello' where the mapping `models:` belongs"),
        (b"{}\n", "models.yaml:1:1: models: the key is required and missing"),
        (b"models:\n", "models.yaml:1:8: models: nothing where a list, each item after a dash, belongs"),
        (b"models: {a: {}}\n", "models.yaml:1:9: models: a mapping where a list, each item after a dash, belongs"),
        (b"models: [a]\n", "models.yaml:1:10: models[0]: the text 'a' where a mapping belongs"),
        (b"model: []\nmodels: []\n", "models.yaml:1:1: model: unknown key"),
        (b"models: []\n---\nmodels: []\n", "models.yaml:2:1: a second document begins; one file is one declaration"),
        ("models: []".encode("utf-16"), "models.yaml:1:1: is UTF-16; save it as UTF-8"),
        (b"models: []\n# caf\xe9\n", "models.yaml:2:6: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        (
            b"models: []\n#\x07\n",
            "models.yaml:2:2: the character U+0007 is not allowed; write it as an escape in double quotes",
        ),
        (b"models:\n\t- name: a\n", "models.yaml:2:1: a tab; YAML indents with spaces"),
        (b"models: [\n", "models.yaml:1:9: '[' is not closed, or a comma is missing after it"),
        (b"models: []\nx: @y\n", "models.yaml:2:4: text that begins with '@' takes quotes"),
        (b"#" * (MAX_BYTES + 1), "models.yaml: is larger than 1 MiB; is it a declaration?"),
    ],
)  # fmt: skip
def test_what_is_no_declaration_says_so(text: bytes, said_so: str):
    assert said(text) == [said_so]


def test_a_byte_order_mark_is_not_a_problem():
    assert parse(b"\xef\xbb\xbf" + HEAD.encode()).models[0].name == "a"


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_lines_are_counted_as_editors_do(newline: str):
    text = (HEAD + "    colour: red\n").replace("\n", newline)
    assert only(text).line == 5


def test_a_path_that_cannot_be_read_is_a_problem(tmp_path: Path):
    (tmp_path / "models.yaml").write_text(HEAD)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, message in [
        (tmp_path / "none.yaml", "no such file"),
        (tmp_path, "is a folder; it holds models.yaml: name that"),
        (tmp_path / "loop", "cannot be read"),
        (tmp_path / "models.yaml" / "x", "cannot be read"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("/dev/zero", "is larger than 1 MiB"),
    ]:
        with pytest.raises(SpecError) as caught:
            load_declaration(path)
        (problem,) = caught.value.problems  # type: ignore[attr-defined]
        assert (problem.file, problem.line) == (str(path), None)
        assert problem.message.startswith(message)


def test_a_damaged_line_takes_no_other_with_it():
    text = HEAD + "    description: it is: bad\n    device: gpu\n" + "  - nome: b\n    source: package:b\n"
    assert [(p.line, p.path) for p in problems_of(text)] == [
        (5, ""), (6, "models[0].device"), (7, "models[1].name"), (7, "models[1].task"), (7, "models[1].nome"),
    ]  # fmt: skip


def test_what_a_damaged_line_may_have_held_is_not_missed():
    assert said("models:\n  - name: 'a\n    task: forecast\n    source: package:a\n") == [
        "models.yaml:2:11: the quotation mark is not closed"
    ]


def test_anchors_and_aliases_share_a_value():
    text = (
        HEAD + "    batching: &b {max_batch_size: 4}\n  - {name: c, task: forecast, source: package:c, batching: *b}\n"
    )
    first, second = parse(text).models
    assert first.batching == second.batching


def test_a_wrong_value_behind_an_alias_is_told_for_each_use():
    text = HEAD + "    batching: &b {size: 4}\n  - {name: c, task: forecast, source: package:c, batching: *b}\n"
    assert [(p.line, p.path) for p in problems_of(text)] == [
        (5, "models[0].batching.size"), (5, "models[1].batching.size"),
    ]  # fmt: skip


def test_an_alias_bomb_is_bounded():
    levels = ["a: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"b{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 20)]
    assert "more than 100000 values" in said("\n".join(levels))[-1]


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_deep_nesting_is_bounded(opening: str):
    (problem,) = problems_of(opening * 50_000)
    assert problem.message == f"nested deeper than {MAX_DEPTH} levels"


def test_deep_nesting_through_aliases_is_bounded():
    levels = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 60)]
    assert any("nested deeper" in line for line in said("\n".join(levels)))


def test_a_file_that_is_no_yaml_at_all_ends():
    lines = said("\n".join(["a: b: c"] * 500))
    assert len(lines) == 21
    assert "more than 20 lines are no YAML" in lines[-1]


def test_long_values_are_cut_short():
    problem = only(HEAD + f"    device: {'x' * 5000}\n")
    assert len(str(problem)) < 300
    assert len(problem.value) < 300


class Quoting(yaml.SafeDumper):
    """Quotes all text, as what is plain text to PyYAML (`1e5`) may be a number to other readers."""


Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


@given(st.lists(model_specs(), max_size=3, unique_by=lambda spec: spec.name))
def test_a_dumped_declaration_loads_equal(specs: list[ModelSpec]):
    text = yaml.dump({"models": [render_spec(spec) for spec in specs]}, Dumper=Quoting, allow_unicode=True)
    assert list(parse(text).models) == specs


def gives_models_or_problems(data: bytes) -> None:
    try:
        declaration = parse(data)
    except InvalidDeclaration as error:
        assert error.problems
        assert str(error).count("\n") + 1 == len(error.problems)
        places = [(p.line or 0, p.column or 0) for p in error.problems]
        assert places == sorted(places)
        lines = data.count(b"\n") + data.count(b"\r") + 1
        assert all(p.line is None or 1 <= p.line <= lines for p in error.problems)
    else:
        assert all(isinstance(spec, ModelSpec) for spec in declaration.models)


PIECES = [
    "models:", "models: ", "\n", "\n  - ", "\n    ", "name: ", "task: ", "source: ", "options: ", "batching: ", "a",
    "python", "text-embedding", "package:x", "file:\\0", "https://x/y", "{", "}", "[", "]", ",", ": ", "- ", "? ",
    "&a ", "*a", "<<: ", "!!python/object ", "!x ", "| ", "|\n", ">-\n", "'", "\"", "\"\\ud800\"", "\"\\x00\"", "#",
    "\t", "%YAML 1.1\n", "---\n", "...\n", ".nan", "1e999", "9" * 5000, "0x" + "f" * 50, "yes", "~", "null", "true",
    "10", "-0", "2001-01-01", "\u2028", "\ufeff", "é", "\r",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
@settings(max_examples=500)
@example("models:\n  - name: a\n    task: [python]\n    source: {}\n    options: 1")
@example("models:\n  - task: python\n    options: {class: {}, arguments: 3}")
@example("? ? a")
@example("a: !!set {a, a}")
@example("*a : 1")
def test_pieces_of_yaml_give_models_or_problems(text: str):
    gives_models_or_problems(text.encode())


@given(st.binary(max_size=100))
def test_any_bytes_give_models_or_problems(data: bytes):
    gives_models_or_problems(data)


def nested() -> st.SearchStrategy[Any]:
    keys = st.sampled_from(
        ["models", "name", "task", "source", "batching", "options", "class", "scaling", "max_queue", "x"]
    )
    leaves = (
        st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(["python", "file:x", "hf:a"])
    )
    return st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5))


@given(st.fixed_dictionaries({"models": st.lists(nested(), max_size=4)}) | nested())
def test_any_document_gives_models_or_problems(document: Any):
    gives_models_or_problems(yaml.dump(document, Dumper=Quoting, allow_unicode=True).encode())


@given(st.data())
def test_a_spoiled_catalog_gives_models_or_problems(data: st.DataObject):
    text = EVERYTHING.encode()
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 20))
    gives_models_or_problems(text[:at] + data.draw(st.sampled_from(PIECES)).encode() + text[at + cut :])
