"""The last requests of a node that have a name, in files that its processes write and whoever is asked reads."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from serve.telemetry.spans import Span
from serve.telemetry.tracing import RequestRecord

_FOLDER = "recent"
_MOST_BYTES = 512 * 1024
_KEPT_S = 3600.0
_UNSAFE = re.compile(r"[^A-Za-z0-9_.#-]")


class Recent:
    """What one process writes: two files of half a MiB at most, of which the older is replaced; used by one thread.

    Args:
        folder: Of the node's metrics.
        instance: Tells this process from others.
    """

    def __init__(self, folder: Path, instance: str) -> None:
        self._path = folder / _FOLDER / f"{_UNSAFE.sub('_', instance)}.jsonl"
        self._size = 0
        self._is_broken = False

    def keep(self, record: RequestRecord, spans: Sequence[Span]) -> None:
        """Remember a request that has a name; where that fails, nobody is harmed."""
        trace, name = record.passage.trace, record.headers.get(b"x-request-id")
        if self._is_broken or trace is None or not trace.is_named or not name:
            return
        offset = time.time() - time.monotonic()
        sizes = [batch.size for batch in trace.batches]
        told = {
            "request_id": name.decode("latin-1"),
            "trace_id": trace.trace_id.hex(),
            "at": record.passage.began + offset,
            "model": record.passage.model or record.scope.get("root_path", "").rpartition("/")[2],
            "outcome": record.passage.outcome,
            "batch_sizes": sizes,
            "spans": [_told(span, offset) for span in spans],
        }
        line = json.dumps(told).encode() + b"\n"
        try:
            self._write(line)
        except OSError:
            self._is_broken = True

    def _write(self, line: bytes) -> None:
        if not self._size:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._clear_old()
        if self._size + len(line) > _MOST_BYTES:
            self._path.replace(self._path.with_suffix(".old"))
            self._size = 0
        with self._path.open("ab") as file:
            file.write(line)
        self._size += len(line)

    def _clear_old(self) -> None:
        """Remove what processes left that ended long ago."""
        for path in self._path.parent.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _KEPT_S:
                    path.unlink()


def _told(span: Span, offset: float) -> dict[str, Any]:
    return {
        "name": span.name,
        "kind": span.kind,
        "span_id": span.span_id.hex(),
        "parent_id": span.parent_id.hex(),
        "at": span.began + offset,
        "seconds": span.ended - span.began,
        "error": span.error,
        "events": [{"name": name, "at": at + offset} for name, at, _ in span.events],
        "attributes": dict(span.attributes),
    }


def find(folder: Path, request_id: str) -> list[dict[str, Any]]:
    """Return what the processes of a node remember of a request, the oldest first; one entry a hop.

    Where a name was given to several requests, the newest of them alone.
    """
    found = sorted(_entries(folder / _FOLDER, request_id), key=lambda entry: float(entry["at"]))
    known = {span["span_id"] for entry in found for span in entry["spans"]}
    roots = [entry for entry in found if entry["spans"][0]["parent_id"] not in known]
    hops = roots[-1:]
    for hop in hops:  # grows as it goes
        own = {span["span_id"] for span in hop["spans"]}
        hops += [entry for entry in found if entry["spans"][0]["parent_id"] in own]
    return hops


def _entries(folder: Path, request_id: str) -> Iterator[dict[str, Any]]:
    sought = json.dumps(request_id).encode()
    for path in (*folder.glob("*.jsonl"), *folder.glob("*.old")):
        with contextlib.suppress(FileNotFoundError):
            for line in path.read_bytes().splitlines():
                if sought in line and line.endswith(b"}"):
                    with contextlib.suppress(ValueError):
                        entry = json.loads(line)
                        if entry["request_id"] == request_id:
                            yield entry
