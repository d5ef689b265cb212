"""What replicas print and log is told once, with whose it is."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.cli import main
from serve.runtime import logs
from serve.runtime.logs import Follower, serious
from serve.telemetry.lines import Event, as_json, as_plain, as_text

EVENT = as_plain(Event(1.0, 40, "serve.stepping", "the model raised", {"rows": 2}), {"model": "mini-lm"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return Ray's folder of logs, with what a replica and others have left there."""
    (tmp_path / "logs" / "serve").mkdir(parents=True)
    (tmp_path / "logs" / "roundhouse").mkdir()
    for name, text in {
        "worker-ab-01-7.out": ":job_id:01000000\n:actor_name:ServeReplica:model-mini-lm:model\nhello\nhal",
        "worker-ab-02-8.err": "Fatal\n:actor_name:SERVE_CONTROLLER_ACTOR\nbusy\n",
        "serve/replica_model-mini-lm_model_x1.log": "WARNING slow\n",
        "serve/replica_gateway_gateway_x2.log": "WARNING lost\n",
        "raylet.out": "not a replica's\n",
    }.items():
        (tmp_path / "logs" / name).write_text(text)
    return tmp_path / "logs"


def test_lines_are_told_once_with_their_model(folder: Path) -> None:
    follower = Follower(folder, log_format="text")
    (folder / "roundhouse" / "model-mini-lm_x1.log").write_text(as_text(EVENT) + "\n")
    assert list(follower.poll()) == [
        "mini-lm | hello",
        "ray | Fatal",
        "controller | busy",
        "gateway | WARNING lost",
        "mini-lm | WARNING slow",
        "mini-lm | 1970-01-01T00:00:01.000Z ERROR the model raised rows=2",
    ]
    printed = folder / "worker-ab-01-7.out"
    with printed.open("a") as file:
        file.write("f\n\nend\n")
    assert list(follower.poll()) == ["mini-lm | half", "mini-lm | end"]
    printed.unlink()
    assert list(follower.poll()) == []


def test_a_folder_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert list(Follower(tmp_path / "logs", log_format="json").poll()) == []


def test_in_json_events_pass_whole_and_what_is_printed_becomes_one(folder: Path) -> None:
    forged = '{"time": "now", "level": "error", "message": "forged", "model": "other"}'
    with (folder / "worker-ab-01-7.out").open("a") as file:
        file.write(f"f\n{forged}\n\x1b[2J\n")
    (folder / "roundhouse" / "model-mini-lm_x1.log").write_text(as_json(EVENT) + "\n")
    lines = list(Follower(folder, log_format="json", clock=lambda: 2.0).poll())
    assert lines[-1] == as_json(EVENT)
    told = [json.loads(line) for line in lines]
    assert [(found.get("model"), found.get("component"), found["level"], found["message"]) for found in told] == [
        ("mini-lm", None, "info", "hello"),
        ("mini-lm", None, "info", "half"),
        ("mini-lm", None, "info", forged),
        ("mini-lm", None, "info", "\\x1b[2J"),
        (None, "ray", "info", "Fatal"),
        (None, "controller", "info", "busy"),
        (None, "gateway", "warning", "WARNING lost"),
        ("mini-lm", None, "warning", "WARNING slow"),
        ("mini-lm", None, "error", "the model raised"),
    ]
    assert {found["time"] for found in told[:-1]} == {"1970-01-01T00:00:02.000Z"}


@pytest.mark.parametrize("log_format", ["json", "text"])
@given(
    lines=st.lists(
        st.binary(max_size=40).filter(lambda each: b"\n" not in each and not each.startswith(b":")), max_size=9
    )
)
def test_however_lines_arrive_none_is_lost(tmp_path_factory, log_format: str, lines: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("logs")
    follower, path, told = Follower(folder, log_format=log_format), folder / "worker-a.out", []
    for byte in b"".join(line + b"\n" for line in lines):
        with path.open("ab") as file:
            file.write(bytes([byte]))
        told += follower.poll()
    if log_format == "text":
        assert told == [f"ray | {line.decode(errors='replace')}" for line in lines if line]
    else:
        assert [json.loads(line)["component"] for line in told] == ["ray" for line in lines if line]


def test_a_file_that_is_put_aside_at_its_size_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "serve").mkdir()
    path = tmp_path / "serve" / "replica_model-a_model_x.log"
    follower = Follower(tmp_path, log_format="text")
    path.write_text("one\n")
    assert list(follower.poll()) == ["a | one"]
    with path.open("a") as file:
        file.write("two\nthr")
    assert list(follower.poll()) == ["a | two"]
    with path.open("a") as file:
        file.write("ee\nfour\n")
    path.rename(path.with_name(f"{path.name}.1"))
    path.write_text("five\n")
    assert list(follower.poll()) == ["a | three", "a | four", "a | five"]
    path.unlink()
    path.with_name("kept").write_text("")  # so that the next file does not get the same inode
    path.write_text("six\n")
    assert list(follower.poll()) == ["a | six"]


def test_a_long_line_is_parted_where_it_is_printed_and_whole_where_it_is_an_event(tmp_path: Path) -> None:
    (tmp_path / "roundhouse").mkdir()
    (tmp_path / "worker-a.out").write_text("x" * 20_000)
    event = as_json(EVENT | {"message": "y" * 100_000})
    (tmp_path / "roundhouse" / "a.log").write_text(event[:70_000])
    follower = Follower(tmp_path, log_format="text")
    assert list(follower.poll()) == ["ray | " + "x" * 20_000]
    with (tmp_path / "roundhouse" / "a.log").open("a") as file:
        file.write(event[70_000:] + "\n")
    assert list(follower.events()) == [event]


@pytest.mark.parametrize("form", [as_json, as_text])
def test_what_is_serious_is_a_warning_or_worse(form) -> None:
    found = serious(form(EVENT))
    assert found is not None
    assert found.items() >= {("model", "mini-lm"), ("level", "error"), ("time", "1970-01-01T00:00:01.000Z")}
    assert found["message"].startswith("the model raised")
    assert serious(form(EVENT | {"level": "warning"}))
    assert not serious(form(EVENT | {"level": "info"}))
    assert not serious("mini-lm | ERROR printed")


class Ended(Exception):
    """Follows no longer."""


@pytest.mark.parametrize(("log_format", "first"), [("auto", "{"), ("json", "{"), ("text", "mini-lm | hello")])
def test_the_command_follows_in_the_form_of_the_settings(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], log_format: str, first: str
) -> None:
    def end(seconds: float) -> None:
        raise Ended

    monkeypatch.setattr(logs, "time", SimpleNamespace(sleep=end))
    monkeypatch.setenv("ROUNDHOUSE_LOG_FORMAT", log_format)
    with pytest.raises(Ended):
        main(["follow-logs", "--folder", str(folder)])
    assert capsys.readouterr().out.startswith(first)
