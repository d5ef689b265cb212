"""A request with a name is found again on its node, newest first, and what is remembered stays small."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from serve.telemetry import recent
from serve.telemetry.passage import Passage
from serve.telemetry.recent import Recent, find
from serve.telemetry.spans import spans_of
from serve.telemetry.tracing import RequestRecord, RequestTrace


def keep(
    one: Recent, name: str, *, trace: bytes = b"t", parent: bytes = b"", is_named: bool = True, at: float = 1.0
) -> None:
    passage = Passage()
    passage.began, passage.arrived, passage.launched, passage.answered, passage.ended = (at + n for n in range(5))
    passage.trace = RequestTrace(trace * 16, parent, b"", is_sampled=False, is_named=is_named)
    scope: dict[str, Any] = {"method": "POST", "path": "/v2/models/m/infer", "root_path": "/v2/models/m"}
    record = RequestRecord(passage, scope, {b"x-request-id": name.encode()}, "/v2/models/{model}/infer", {}, False)
    one.keep(record, list(spans_of(record)))


def test_a_request_is_found_with_all_its_hops(tmp_path: Path):
    gateway, replica = Recent(tmp_path, "SERVE_REPLICA::gateway#1"), Recent(tmp_path, "model#2")
    keep(gateway, "a", trace=b"x")
    (asked,) = find(tmp_path, "a")
    keep(replica, "a", trace=b"x", parent=bytes.fromhex(asked["spans"][0]["span_id"]), at=2.0)
    keep(replica, "b", trace=b"y")
    first, second = find(tmp_path, "a")
    assert first["at"] < second["at"]
    assert first["trace_id"] == second["trace_id"] == (b"x" * 16).hex()
    assert second["model"] == "m"
    assert [span["name"] for span in second["spans"]] == [
        "POST /v2/models/{model}/infer", "read", "queue", "compute", "respond",
    ]  # fmt: skip
    assert [span["seconds"] for span in second["spans"]] == [4.0, 1.0, 1.0, 1.0, 1.0]
    assert find(tmp_path, "c") == []


def test_of_a_name_that_was_given_twice_the_newest_is_told(tmp_path: Path):
    one = Recent(tmp_path, "a")
    keep(one, "same", trace=b"n", at=50.0)
    keep(one, "same", trace=b"n", at=60.0)
    keep(one, "same", trace=b"o", at=10.0)
    (found,) = find(tmp_path, "same")
    assert found["trace_id"] == (b"n" * 16).hex()
    assert found["at"] - found["spans"][0]["at"] == 0


def test_a_request_without_a_name_is_not_remembered(tmp_path: Path):
    keep(Recent(tmp_path, "a"), "x", is_named=False)
    assert find(tmp_path, "x") == []
    assert list(tmp_path.rglob("*.jsonl")) == []


def test_what_is_remembered_stays_small_and_the_last_is_in_it(tmp_path: Path):
    one = Recent(tmp_path, "a")
    for number in range(3000):
        keep(one, f"request {number}")
    files = list((tmp_path / "recent").iterdir())
    assert len(files) == 2
    assert sum(path.stat().st_size for path in files) <= 2 * 512 * 1024
    assert find(tmp_path, "request 2999")
    assert not find(tmp_path, "request 1")


def test_names_of_any_kind_are_found(tmp_path: Path):
    one = Recent(tmp_path, "a")
    for name in ('quo"te', "back\\slash", "tür", "line\\n", "%2F/.."):
        keep(one, name.encode().decode("latin-1"))
    for path in (tmp_path / "recent").iterdir():
        for line in path.read_text().splitlines():
            assert find(tmp_path, json.loads(line)["request_id"])


def test_what_dead_processes_left_goes_after_an_hour(tmp_path: Path):
    old = tmp_path / "recent" / "old.jsonl"
    old.parent.mkdir()
    old.write_text("{}\n")
    os.utime(old, (time.time() - 3601, time.time() - 3601))
    keep(Recent(tmp_path, "a"), "x")
    assert not old.exists()


def test_a_folder_that_cannot_be_written_harms_nobody(tmp_path: Path):
    (tmp_path / "recent").write_text("no folder")
    keep(Recent(tmp_path, "a"), "x")
    assert recent.find(tmp_path, "x") == []
