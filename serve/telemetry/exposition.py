"""The metrics of a whole node as one text, in which dead processes' counts stay and their gauges do not."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from serve.telemetry.instruments import FOUND, MEMORY, RECORDED, UNIT_WORDS, Instrument, Sample, roles_of
from serve.telemetry.page import Reading, read_folder


def exposed(folder: Path, accept: str, found: Iterable[Sample] = ()) -> tuple[bytes, str]:
    """Return a node's metrics and their content type.

    Args:
        folder: Where the node's processes keep their pages.
        accept: The Accept header of whoever asks: exemplars are told in OpenMetrics only.
        found: What was found out beside them.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Node(folder, found))
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Node(Collector):
    """The merged pages of a folder, and what was found out beside them, as metric families."""

    def __init__(self, folder: Path, found: Iterable[Sample]) -> None:
        self._folder = folder
        self._found = list(found)

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        readings = read_folder(self._folder)
        for instrument in RECORDED:
            yield _family(instrument, _by_model(readings, roles_of(instrument)))
        yield _memory(_by_model(readings, {"replica"}))
        for instrument in FOUND:
            yield _as_found(instrument, [sample for sample in self._found if sample.instrument is instrument])


def _as_found(instrument: Instrument, samples: Iterable[Sample]) -> Any:
    family: Any = _empty(CounterMetricFamily if instrument.kind == "counter" else GaugeMetricFamily, instrument)
    for sample in samples:
        family.add_metric([sample.model, *sample.values], sample.number)
    return family


def _by_model(readings: Sequence[Reading], roles: Collection[str]) -> dict[str, list[Reading]]:
    by_model: dict[str, list[Reading]] = defaultdict(list)
    for reading in readings:
        if reading.role in roles:
            by_model[reading.model].append(reading)
    return by_model


def _family(instrument: Instrument, by_model: dict[str, list[Reading]]) -> Any:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    family: Any = _empty(kinds[instrument.kind], instrument)
    merge = max if instrument.merged == "max" else sum
    for model, readings in by_model.items():
        # What waited in a process that has ended waits no more.
        counted = [reading for reading in readings if reading.is_alive or instrument.kind != "gauge"]
        for values in instrument.series():
            told = [merge(each) for each in zip(*(one.numbers(instrument, values) for one in counted), strict=True)]
            if instrument.kind != "histogram":
                family.add_metric([model, *values], told[0] if told else 0.0)
            elif any(told[:-1]):
                family.add_metric([model, *values], _buckets(instrument, values, told, counted), told[-1])
    return family


def _empty(kind: Any, instrument: Instrument) -> Any:
    unit = UNIT_WORDS.get(instrument.unit, "")
    return kind(instrument.exposed_name, instrument.description, labels=["model", *instrument.labels], unit=unit)


def _buckets(
    instrument: Instrument, values: tuple[str, ...], told: Sequence[float], readings: Sequence[Reading]
) -> list[tuple[str, float, Exemplar | None]]:
    """Return a histogram's buckets as they are told: bound, cumulated count, exemplar."""
    bounds = [*map(str, instrument.bounds), "+Inf"]
    exemplars = _newest(instrument, values, readings) if instrument.exemplars else [None] * len(bounds)
    return list(zip(bounds, accumulate(told[:-1]), exemplars, strict=True))


def _newest(instrument: Instrument, values: tuple[str, ...], readings: Sequence[Reading]) -> list[Exemplar | None]:
    columns = zip(*(reading.exemplars(instrument, values) for reading in readings), strict=True)
    return [_exemplar(max(filter(None, column), default=None)) for column in columns]


def _exemplar(found: tuple[float, float, bytes, bytes] | None) -> Exemplar | None:
    if found is None:
        return None
    at, value, trace_id, span_id = found
    return Exemplar({"trace_id": trace_id.hex(), "span_id": span_id.hex()}, value, at)


def _memory(by_model: dict[str, list[Reading]]) -> Any:
    family: Any = _empty(GaugeMetricFamily, MEMORY)
    for model, readings in by_model.items():
        alive = {reading.pid for reading in readings if reading.is_alive}
        family.add_metric([model], float(sum(map(memory_bytes, alive))))
    return family


def memory_bytes(pid: int) -> int:
    """Return a process's share of main memory, or 0 where it is gone or not ours to look at."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        with contextlib.suppress(psutil.AccessDenied):
            told = process.memory_full_info()
            return int(getattr(told, "pss", told.rss))
        return int(process.memory_info().rss)
    return 0
