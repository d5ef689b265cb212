"""A scrape as Prometheus makes it: its own parser over what is exposed, and each sample by name and labels."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.samples import Exemplar, Sample

from serve.telemetry.exposition import exposed

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def parse(text: str) -> list[Sample]:
    """Return the samples of an OpenMetrics text; the parser raises where it breaks a rule."""
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


class Samples:
    """What one scrape found."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def series(self) -> set[tuple[str, frozenset[tuple[str, str]]]]:
        """Return each series' name and labels."""
        return {(sample.name, frozenset(sample.labels.items())) for sample in self.samples}

    def found(self, name: str, **labels: str) -> list[Sample]:
        """Return the samples of a name, without `roundhouse_`, that have the labels."""
        return [
            sample
            for sample in self.samples
            if sample.name == f"roundhouse_{name}" and labels.items() <= sample.labels.items()
        ]

    def __call__(self, name: str, **labels: str) -> float:
        """Return the sum of what `found` finds; 0 where there is nothing."""
        return sum(sample.value for sample in self.found(name, **labels))

    def nonzero(self, name: str, label: str) -> dict[str, float]:
        """Return a name's values that are not 0 by one of its labels."""
        return {sample.labels[label]: sample.value for sample in self.found(name) if sample.value}

    def exemplars(self, name: str) -> dict[str, Exemplar]:
        """Return the exemplars of a histogram by their buckets' bounds."""
        return {sample.labels["le"]: sample.exemplar for sample in self.found(f"{name}_bucket") if sample.exemplar}


class Scrape(Samples):
    """One scrape of a folder."""

    def __init__(self, folder: Path) -> None:
        text, self.content_type = exposed(folder, OPENMETRICS)
        super().__init__(parse(text.decode()))
