"""The command as people and scripts meet it: its page, its output, its exit status, and what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from serve import __version__
from serve.cli import COMMANDS, main
from serve.schema import json_schema, markdown_tables

ROOT = Path(__file__).parent.parent
WRONG = "models:\n  - name: a\n    task: text-embedding\n    source: package:a\n    batching: {max_batchsize: 4}\n"


@pytest.fixture
def wrong(tmp_path: Path) -> str:
    path = tmp_path / "wrong.yaml"
    path.write_text(WRONG)
    return str(path)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve.cli", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_check_shows_what_is_declared(capsys: pytest.CaptureFixture[str]):
    assert main(["check", str(ROOT / "models.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["MODEL", "TASK", "SOURCE", "REPLICAS", "DEVICE", "REVISION"]
    assert [line.split()[0] for line in lines[1:-1]] == [
        "minilm", "smollm2", "efficientnet", "whisper", "forecaster", "vad",
    ]  # fmt: skip
    assert lines[-1].endswith("models.yaml: 6 models, no problem")


def test_check_tells_problems_as_a_compiler_does(wrong: str, capsys: pytest.CaptureFixture[str]):
    assert main(["check", wrong]) == 1
    assert capsys.readouterr().out == (
        f"{wrong}:5:16: models[0].batching.max_batchsize: unknown key; did you mean max_batch_size?\n"
        f"{wrong}: 1 problem\n"
    )


def test_check_as_json(wrong: str, capsys: pytest.CaptureFixture[str]):
    assert main(["check", "--json", wrong]) == 1
    assert json.loads(capsys.readouterr().out) == [
        {
            "file": wrong,
            "line": 5,
            "column": 16,
            "path": "models[0].batching.max_batchsize",
            "message": "unknown key",
            "value": 4,
            "suggestion": "max_batch_size",
        }
    ]
    assert main(["check", "--json", str(ROOT / "models.yaml")]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_json_stays_json_for_numbers_that_json_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "models.yaml"
    path.write_text("models: [{resources: {cpus: .nan, gpus: 1e999}, options: [.inf]}]")
    assert main(["check", "--json", str(path)]) == 1
    json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_an_absent_file_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = str(tmp_path / "none.yaml")
    assert main(["check", path]) == 1
    assert capsys.readouterr().out == f"{path}: no such file\n{path}: 1 problem\n"


def test_schema_prints_the_schema(capsys: pytest.CaptureFixture[str]):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()


def test_the_reference_page_holds_the_tables_of_the_schema(capsys: pytest.CaptureFixture[str]):
    assert main(["schema", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown_tables()
    page = (ROOT / "docs" / "models-yaml.md").read_text()
    begin, end = "<!-- tables: roundhouse schema --markdown -->\n", "<!-- end of tables -->"
    assert page[page.index(begin) + len(begin) : page.index(end)].strip() == markdown_tables().strip(), (
        "put the output of `roundhouse schema --markdown` between the marks in docs/models-yaml.md"
    )


def test_the_examples_of_the_reference_page_are_right(tmp_path: Path):
    page = (ROOT / "docs" / "models-yaml.md").read_text()
    examples = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    assert examples
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "shout.py").touch()
    for number, example in enumerate(examples):
        path = tmp_path / f"{number}.yaml"
        path.write_text(example)
        assert main(["check", str(path)]) == 0, example


def test_rules_prints_what_prometheus_loads(capsys: pytest.CaptureFixture[str]):
    assert main(["rules", "--runbooks", "https://pages.example.com/"]) == 0
    groups = yaml.safe_load(capsys.readouterr().out)["groups"]
    urls = [rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert urls
    assert all(
        url.startswith("https://pages.example.com/") and not url.startswith("https://pages.example.com//")
        for url in urls
    )


def test_metrics_of_a_node_want_its_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv("ROUNDHOUSE_METRICS_DIR", raising=False)
    assert main(["metrics"]) == 1
    assert "ROUNDHOUSE_METRICS_DIR is not set" in capsys.readouterr().err


def test_help_is_one_page_with_every_command():
    page = run("--help")
    assert page.returncode == 0
    assert all(f"roundhouse {command.name}" in page.stdout and command.summary in page.stdout for command in COMMANDS)
    assert len(page.stdout.splitlines()) <= 24
    assert max(map(len, page.stdout.splitlines())) <= 100


def test_without_arguments_the_page_is_shown_and_it_is_wrong_usage():
    bare = run()
    assert (bare.returncode, bare.stdout) == (2, run("--help").stdout)


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_every_command_has_its_help(command: str):
    page = run(command, "--help")
    assert page.returncode == 0
    assert page.stdout.startswith(f"usage: roundhouse {command}")


def test_version():
    assert run("--version").stdout == f"roundhouse {__version__}\n"


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from serve.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*sorted({'pydantic', 'yaml', 'fastapi', 'ray', 'torch', 'numpy', 'rich', 'asyncio'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chek"], "no command 'chek'; did you mean check?"),
        (["zzz"], "no command 'zzz'; there are "),
        (["check", "--jsn"], "unrecognized arguments: --jsn"),
        (["check", "a", "b"], "unrecognized arguments: b"),
        (["--nope"], "required: COMMAND"),
        (["--context", "prod"], "no command beside --context; such as roundhouse --context NAME status"),
        (["--context", "prod", "chek"], "no command 'chek'; did you mean check?"),
        (["--context", "prod", "check"], "unrecognized arguments: --context"),
    ],
)
def test_wrong_usage_says_what_is_right(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_output_that_the_terminal_cannot_show_is_escaped(tmp_path: Path):
    path = tmp_path / "models.yaml"
    path.write_text("models: []\nключ: 1\n", encoding="utf-8")
    result = run("check", str(path), PYTHONIOENCODING="ascii")
    assert result.returncode == 1
    assert "unknown key" in result.stdout
    assert "Traceback" not in result.stderr


def test_a_reader_that_leaves_early_sees_no_traceback():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        result = subprocess.run(
            [sys.executable, "-m", "serve.cli", "schema"], cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True
        )
    assert result.stderr == ""
