"""Pages are shared by files: each has one owner, outlives it, and is read by anybody at any time."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.telemetry import instruments as named
from serve.telemetry.page import EXEMPLAR, Page, layout_of, read_folder
from serve.telemetry.traceparent import TraceIds

KILLED = """
import os, signal, sys
from pathlib import Path
from serve.telemetry import instruments as named
from serve.telemetry.page import Page

page = Page.claim(Path(sys.argv[1]), role="replica", model="a")
page.counters(named.COLD_STARTS)[()].add(3)
page.gauges(named.QUEUE_DEPTH)["item",].set(7)
os.kill(os.getpid(), signal.SIGKILL)
"""


def claimed(folder: Path, model: str = "a", role: str = "replica") -> Page:
    return Page.claim(folder, role=role, model=model)


def number(folder: Path, instrument: named.Instrument, *values: str, index: int = 0) -> list[float]:
    return [reading.numbers(instrument, values)[index] for reading in read_folder(folder)]


def test_a_living_owner_keeps_its_page_and_another_gets_one_of_its_own(tmp_path: Path):
    first, second = claimed(tmp_path), claimed(tmp_path)
    first.counters(named.COLD_STARTS)[()].add()
    second.counters(named.COLD_STARTS)[()].add(2)
    assert number(tmp_path, named.COLD_STARTS) == [1, 2]
    assert [reading.is_alive for reading in read_folder(tmp_path)] == [True, True]
    assert {reading.pid for reading in read_folder(tmp_path)} == {os.getpid()}


def test_the_next_process_of_a_model_goes_on_counting_and_starts_its_gauges_anew(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = read_folder(tmp_path)
    assert not left.is_alive
    assert left.numbers(named.COLD_STARTS, ()) == (3,)
    assert left.numbers(named.QUEUE_DEPTH, ("item",)) == (7,)

    other = claimed(tmp_path, model="b")
    page = claimed(tmp_path)
    page.counters(named.COLD_STARTS)[()].add()
    readings = {reading.model: reading for reading in read_folder(tmp_path)}
    assert len(readings) == len(list(tmp_path.glob("*.page"))) == 2
    assert readings["a"].is_alive
    assert readings["a"].pid == os.getpid()
    assert readings["a"].numbers(named.COLD_STARTS, ()) == (4,)
    assert readings["a"].numbers(named.QUEUE_DEPTH, ("item",)) == (0,)
    other.release()


def test_reading_takes_no_page_from_anybody(tmp_path: Path):
    page = claimed(tmp_path)
    page.release()
    (path,) = tmp_path.glob("*.page")
    with path.open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert not read_folder(tmp_path)[0].is_alive


def test_pages_of_another_layout_or_cut_short_are_left_out(tmp_path: Path):
    claimed(tmp_path)
    (path,) = tmp_path.glob("*.page")
    role, model, fingerprint, last = path.name.split(".", 3)
    (tmp_path / f"{role}.{model}.{fingerprint[::-1]}.{last}").write_bytes(path.read_bytes())
    (tmp_path / f"stranger.{model}.{fingerprint}.{last}").write_bytes(path.read_bytes())
    (tmp_path / f"{role}.b.{fingerprint}.{last}").write_bytes(path.read_bytes()[:-1])
    assert [(reading.role, reading.model) for reading in read_folder(tmp_path)] == [("replica", "a")]


def test_a_page_that_was_cut_short_is_made_whole_when_it_is_claimed(tmp_path: Path):
    page = claimed(tmp_path)
    page.counters(named.REQUESTS)["openai", "ok"].add(5)
    page.release()
    (path,) = tmp_path.glob("*.page")
    os.truncate(path, layout_of("replica").size_bytes - 1)
    claimed(tmp_path)
    assert number(tmp_path, named.REQUESTS, "openai", "ok") == [5]


def test_a_folder_that_cannot_be_had_is_an_error_of_the_system(tmp_path: Path):
    (tmp_path / "taken").touch()
    with pytest.raises(OSError, match="taken"):
        claimed(tmp_path / "taken")


def test_no_series_shares_its_place_with_another(tmp_path: Path):
    for role, instruments in named.ROLES.items():
        page = claimed(tmp_path, role=role)
        for one in instruments:
            for series in (*page.counters(one).values(),) if one.kind == "counter" else ():
                series.add()
            for gauge in (*page.gauges(one).values(),) if one.kind == "gauge" else ():
                gauge.set(1)
            for histogram in (*page.histograms(one).values(),) if one.kind == "histogram" else ():
                for bound in (*one.bounds, float("inf")):
                    histogram.observe(bound if bound < float("inf") else 2 * one.bounds[-1])
    for reading in read_folder(tmp_path):
        for one in named.ROLES[reading.role]:
            for values in one.series():
                found = reading.numbers(one, values)
                assert found[: len(one.bounds) + 1] == (1,) * (len(one.bounds) + 1)
                if one.bounds:
                    assert found[-1] == pytest.approx(sum(one.bounds) + 2 * one.bounds[-1])


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 9))))
def test_a_histogram_counts_each_value_in_the_first_bucket_that_holds_it(observed: list[tuple[float, int]]):
    page = Page.private("replica")
    histogram = page.histograms(named.INTER_TOKEN_LATENCY)[()]
    for value, times in observed:
        histogram.observe(value, times)
    bounds = [*named.INTER_TOKEN_LATENCY.bounds, float("inf")]
    expected = [0] * len(bounds)
    for value, times in observed:
        expected[next(index for index, bound in enumerate(bounds) if value <= bound)] += times
    *counts, total = page.reading("a").numbers(named.INTER_TOKEN_LATENCY, ())
    assert counts == expected
    assert total == pytest.approx(sum(value * times for value, times in observed))


def test_an_exemplar_is_the_last_of_its_bucket_and_half_a_write_is_none(tmp_path: Path):
    duration = claimed(tmp_path).histograms(named.REQUEST_DURATION)["openai", "ok"]
    for name in (b"old", b"new"):
        duration.observe_traced(0.07, TraceIds(name.rjust(16), name.rjust(8)))
    (reading,) = read_folder(tmp_path)
    found = [one for one in reading.exemplars(named.REQUEST_DURATION, ("openai", "ok")) if one]
    assert [(value, trace.strip(), span.strip()) for _, value, trace, span in found] == [(0.07, b"new", b"new")]

    (path,) = tmp_path.glob("*.page")
    content = bytearray(path.read_bytes())
    at = content.index(b"new".rjust(16)) - 16
    begun, *rest, _ = EXEMPLAR.unpack_from(content, at)
    path.write_bytes(content[:at] + EXEMPLAR.pack(begun, *rest, begun + 1) + content[at + EXEMPLAR.size :])
    (reading,) = read_folder(tmp_path)
    assert not any(reading.exemplars(named.REQUEST_DURATION, ("openai", "ok")))
