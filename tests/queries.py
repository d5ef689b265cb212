"""The queries of the dashboards, as Grafana would send them and as a parser takes them apart."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser as promql

from charts.dashboards.parts import NO_GPU
from serve.telemetry.dashboards import dashboards

#: Prometheus gives them to every series that it scrapes.
OF_TARGETS = {"instance", "job"}


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel, or a dashboard's marks, with its queries.

    Args:
        told: What the dashboard's file says of it.
        queries: PromQL with Grafana's variables, and what the legend says.
    """

    board: str
    title: str
    told: dict[str, Any]
    queries: list[tuple[str, str]]

    def __str__(self) -> str:
        return f"{self.board}: {self.title}{' (marks)' if self.is_marks else ''}"

    @property
    def is_marks(self) -> bool:
        return "iconColor" in self.told

    @property
    def wants_gpu(self) -> bool:
        """Whether it may be empty where there is no GPU."""
        return self.told.get("fieldConfig", {}).get("defaults", {}).get("noValue") == NO_GPU


def boards() -> dict[str, dict[str, Any]]:
    return {one.uid: json.loads(one.text) for one in dashboards()}


def panels() -> list[Panel]:
    """Return all panels, rows left out, and the marks."""
    found = []
    for uid, board in boards().items():
        for told in board["panels"]:
            if told["type"] != "row":
                queries = [(target["expr"], target["legendFormat"]) for target in told.get("targets", ())]
                found.append(Panel(uid, told["title"], told, queries))
        for told in board["annotations"].get("list", ()):
            found.append(Panel(uid, told["name"], told, [(told["expr"], told["titleFormat"])]))
    return found


def whole(expr: str, *, model: str = "minilm", interval: str = "1m", time_range: str = "1h") -> str:
    """Return a query with Grafana's variables replaced."""
    values = {"model": model, "__rate_interval": interval, "__range": time_range}
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], expr)


@dataclass(frozen=True, slots=True)
class Use:
    """A series that a query reads, a label of it that it uses, and the values that the label is compared with."""

    metric: str
    label: str
    values: tuple[str, ...] = ()


def metrics(node: Any) -> Iterator[str]:
    """Yield the names of the series that a parsed query reads."""
    for selector in selectors(node):
        yield selector.name


def selectors(node: Any) -> Iterator[Any]:
    if isinstance(node, promql.VectorSelector):
        yield node
    for child in _children(node):
        yield from selectors(child)


def uses(node: Any) -> Iterator[Use]:
    """Yield each use of a label in a parsed query: in a selector, in `by` and between two sides."""
    if isinstance(node, promql.VectorSelector):
        for matcher in node.matchers.matchers:
            yield Use(node.name, matcher.name, tuple(matcher.value.split("|")))
    for label in _grouping(node):
        for metric in metrics(node):
            yield Use(metric, label)
    for child in _children(node):
        yield from uses(child)


def _children(node: Any) -> list[Any]:
    if isinstance(node, promql.BinaryExpr):
        return [node.lhs, node.rhs]
    if isinstance(node, promql.Call):
        return list(node.args)
    if isinstance(node, promql.MatrixSelector):
        return [node.vector_selector]
    if isinstance(node, (promql.AggregateExpr, promql.ParenExpr, promql.UnaryExpr, promql.SubqueryExpr)):
        return [node.expr]
    assert isinstance(node, (promql.VectorSelector, promql.NumberLiteral, promql.StringLiteral)), node
    return []


def _grouping(node: Any) -> list[str]:
    if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
        return list(node.modifier.labels)
    if isinstance(node, promql.BinaryExpr) and node.modifier is not None and node.modifier.matching is not None:
        return list(node.modifier.matching.labels)
    return []
