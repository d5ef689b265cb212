"""What Prometheus records and alerts on, told once: `roundhouse rules` prints it, and the chart holds what it prints.

Everything is by `namespace` and `model`; a Prometheus beside `roundhouse up` has no namespaces, which the rules do not
mind. The windows and factors of a budget's burning are those of the Site Reliability Workbook, chapter 5.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

#: Window -> seconds, of what is recorded of each objective.
WINDOWS = {"5m": 300, "30m": 1800, "1h": 3600, "2h": 7200, "6h": 21600, "1d": 86400, "3d": 259200}
Severity = Literal["critical", "warning"]
QUANTILES = ("0.5", "0.95", "0.99")

#: Requests of the longer window that must have been missed before an alert fires: one of two is no reason to wake up.
FEWEST_MISSED = 10

#: Under which names Prometheus scrapes nodes, what is the same of all, and controllers.
NODE_JOB, PLATFORM_JOB, CONTROLLER_JOB = "roundhouse", "roundhouse-platform", "roundhouse-controller"

_OBJECTIVE = "namespace_model_objective"
_TARGET = f"{_OBJECTIVE}:roundhouse_objective_target:last6h"
_QUEUED = "namespace_model:roundhouse_queue_depth:sum"
_READY = "namespace_model:roundhouse_model_ready:sum"
_WHERE = "{{ with $labels.namespace }} in namespace {{ . }}{{ end }}"
_MODEL, _NAMED = (f"{word} {{{{ $labels.model }}}}{_WHERE}" for word in ("Model", "model"))
_VALUE = "{{ $value | humanize }}"
_PERCENT = "{{ $value | humanizePercentage }}"


@dataclass(frozen=True, slots=True)
class Recording:
    """A series that is computed ahead.

    Args:
        labels: That it gets besides those of the expression.
    """

    name: str
    expression: str
    labels: tuple[tuple[str, str], ...] = ()

    def as_rule(self, *, runbooks: str) -> dict[str, Any]:  # noqa: ARG002 - as of an Alert
        """Return it as Prometheus reads it."""
        return {"record": self.name, "expr": self.expression} | ({"labels": dict(self.labels)} if self.labels else {})


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that a person should know.

    Args:
        severity: `critical` is for now, `warning` for working hours.
        expression: Holds where it fires; its value is told in `description`.
        when: The same for readers of docs/alerts.md.
        lasts: How long it must hold, as Prometheus writes durations.
        summary, description: Templates of Prometheus.
    """

    name: str
    severity: Severity
    expression: str
    when: str
    summary: str
    description: str
    lasts: str = "0s"

    @property
    def page(self) -> str:
        """Return the file name of its runbook."""
        words = re.findall("[A-Z][a-z]+", self.name.removeprefix("Roundhouse"))
        return f"{'-'.join(words).lower()}.md"

    def as_rule(self, *, runbooks: str) -> dict[str, Any]:
        """Return it as Prometheus reads it."""
        return {
            "alert": self.name,
            "expr": self.expression,
            "for": self.lasts,
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "runbook_url": f"{runbooks.rstrip('/')}/{self.page}",
            },
        }


# Recordings


def _requests(window: str) -> str:
    return f"{_OBJECTIVE}:roundhouse_objective_requests:rate{window}"


def _missed(window: str) -> str:
    return f"{_OBJECTIVE}:roundhouse_objective_missed:ratio_rate{window}"


def _objective_recordings() -> Iterator[Recording]:
    by = "sum by (namespace, model, objective)"
    told = "roundhouse_objective_requests_total"
    for window in WINDOWS:
        yield Recording(_requests(window), f"{by} (rate({told}[{window}]))")
        missed = f'{by} (rate({told}{{result="missed"}}[{window}]))'
        yield Recording(_missed(window), f"{missed} / ({_requests(window)} > 0)")
    # Living replicas tell what they promise. A model that has none just now goes on having promised it.
    target = "max by (namespace, model, objective) (last_over_time((roundhouse_objective_target > 0)[6h:1m]))"
    yield Recording(_TARGET, target)


def _model_recordings() -> Iterator[Recording]:
    yield Recording(
        "namespace_model_outcome:roundhouse_requests:rate5m",
        "sum by (namespace, model, outcome) (rate(roundhouse_requests_total[5m]))",
    )
    yield Recording(_QUEUED, "sum by (namespace, model) (roundhouse_queue_depth)")
    yield Recording(_READY, 'sum by (namespace, model) (roundhouse_model_phase{phase="ready"})')
    for name, chosen in (("request_duration", '{status="ok"}'), ("time_to_first_token", "")):
        for quantile in QUANTILES:
            rate = f"sum by (namespace, model, le) (rate(roundhouse_{name}_seconds_bucket{chosen}[5m]))"
            yield Recording(
                f"namespace_model:roundhouse_{name}_seconds:quantile5m",
                f"histogram_quantile({quantile}, {rate})",
                labels=(("quantile", quantile),),
            )


# Alerts


class Burn(NamedTuple):
    """A pace at which a budget of errors is used up: `factor` times what would last for the whole 30 days."""

    factor: float
    long: str
    short: str


FAST = (Burn(14.4, "1h", "5m"), Burn(6, "6h", "30m"))
SLOW = (Burn(3, "1d", "2h"), Burn(1, "3d", "6h"))


def _burning(objective: str, burns: tuple[Burn, ...]) -> str:
    chosen = f'{{objective="{objective}"}}'

    def one(burn: Burn) -> str:
        allowed = f"{burn.factor:g} * (1 - {_TARGET}{chosen})"
        missed = f"{_requests(burn.long)}{chosen} * {_missed(burn.long)}{chosen} * {WINDOWS[burn.long]}"
        return (
            f"(\n  {_missed(burn.long)}{chosen} > {allowed}"
            f"\n  and {_missed(burn.short)}{chosen} > {allowed}"
            f"\n  and {missed} >= {FEWEST_MISSED}\n)"
        )

    return "\nor\n".join(map(one, burns))


def _paces(burns: tuple[Burn, ...]) -> str:
    each = " or ".join(f"{burn.factor:g} times (over {burn.long} and {burn.short})" for burn in burns)
    return f"{each} the pace that lasts for 30 days"


def _budget_alerts() -> Iterator[Alert]:
    speeds: tuple[tuple[Severity, tuple[Burn, ...], str], ...] = (
        ("critical", FAST, "fast"),
        ("warning", SLOW, "slowly"),
    )
    for severity, burns, speed in speeds:
        yield Alert(
            "RoundhouseAvailabilityBurns",
            severity,
            _burning("availability", burns),
            when=f"failed requests burn the budget at {_paces(burns)}",
            summary=f"{_MODEL} fails requests and burns its error budget {speed}.",
            description=f"{_PERCENT} of the requests of {_NAMED} failed by no doing of their"
            f" callers. That burns the budget at {_paces(burns)}.",
        )
        yield Alert(
            "RoundhouseLatencyBurns",
            severity,
            _burning("latency", burns),
            when=f"late answers burn the budget at {_paces(burns)}",
            summary=f"{_MODEL} answers late and burns its latency budget {speed}.",
            description=f"{_PERCENT} of the answers of {_NAMED} began later than its"
            f" objectives.latency_ms. That burns the budget at {_paces(burns)}.",
        )


def _increase(metric: str, chosen: str, window: str, *, by: str = "namespace, model") -> str:
    return f"sum by ({by}) (increase({metric}{chosen}[{window}]))"


def _model_alerts() -> Iterator[Alert]:
    up, down = (
        _increase("roundhouse_scaling_decisions_total", f'{{direction="{direction}"}}', "1h")
        for direction in ("up", "down")
    )
    yield Alert(
        "RoundhouseModelNotReady",
        "critical",
        f'max by (namespace, model) (roundhouse_scaling_replicas{{state="wanted"}}) > 0\nunless {_READY} > 0',
        lasts="15m",
        when="replicas are wanted and none has been ready for 15 minutes",
        summary=f"{_MODEL} has no ready replica.",
        description=f"{{{{ $value }}}} replicas of {_NAMED} are wanted and none has been ready"
        " for 15 minutes: every request gets 503.",
    )
    yield Alert(
        "RoundhouseModelFailsToLoad",
        "warning",
        f"{_increase('roundhouse_model_load_failures_total', '', '1h', by='namespace, model, reason')} >= 2",
        when="a model failed to load twice within an hour",
        summary=f"{_MODEL} fails to load.",
        description=f"{_MODEL} failed to load {_VALUE} times within an hour, because of its {{{{ $labels.reason }}}}.",
    )
    yield Alert(
        "RoundhouseReplicasRestart",
        "warning",
        f"{_increase('roundhouse_cold_starts_total', '', '1h')}\n/ clamp_min(max_over_time({_READY}[1h]), 1) >= 4",
        when="each replica became ready four times within an hour",
        summary=f"Replicas of {_NAMED} start again and again.",
        description=f"Each replica of {_NAMED} became ready {_VALUE} times"
        " within an hour: they end soon after they start.",
    )
    yield Alert(
        "RoundhouseScalingFlaps",
        "warning",
        f"{up} >= 4\nand {down} >= 4",
        when="a model was scaled up four times and down four times within an hour",
        summary=f"{_MODEL} is scaled up and down again and again.",
        description=f"{_MODEL} was scaled up {_VALUE} times within an hour, and down at least four times.",
    )
    yield Alert(
        "RoundhouseQueueGrows",
        "warning",
        f"min_over_time({_QUEUED}[10m]) >= 10\nand deriv({_QUEUED}[10m]) > 0",
        lasts="10m",
        when="ten items or more have waited, and ever more, for 20 minutes",
        summary=f"The queue of {_NAMED} grows.",
        description=f"At least {_VALUE} items have been waiting for {_NAMED}, and more come than it answers.",
    )


def _platform_alerts() -> Iterator[Alert]:
    passes, errors, leads = (f"roundhouse_controller_{name}" for name in ("passes_total", "errors_total", "leads"))
    spans, dropped = "roundhouse_telemetry_spans_total", '{result="dropped"}'
    yield Alert(
        "RoundhouseControllerStuck",
        "critical",
        f"{_increase(passes, '', '10m', by='namespace')} == 0"
        f"\nor\n(group by (namespace) (last_over_time({leads}[1d])) unless group by (namespace) ({leads}))",
        lasts="5m",
        when="no controller of a namespace made a pass for 15 minutes, or none that was there is left",
        summary=f"The controller{_WHERE} no longer reconciles.",
        description=f"No controller{_WHERE} has made a pass for 15 minutes. Models that run go on answering; edits,"
        " retries and new models wait.",
    )
    yield Alert(
        "RoundhouseControllerFails",
        "warning",
        f"{_increase(errors, '', '15m', by='namespace')}\n/ {_increase(passes, '', '15m', by='namespace')} > 0.5",
        lasts="15m",
        when="most passes of a controller have failed for 15 minutes",
        summary=f"Most passes of the controller{_WHERE} fail.",
        description=f"{_PERCENT} of the passes of the controller{_WHERE} failed: it cannot reach Kubernetes or Ray, or"
        " is refused there.",
    )
    yield Alert(
        "RoundhouseNotScraped",
        "critical",
        f'group by (namespace) (last_over_time(up{{job="{NODE_JOB}"}}[1d]))'
        f'\nunless group by (namespace) (up{{job="{NODE_JOB}"}} == 1)',
        lasts="5m",
        when="no node that was there within a day answers scrapes",
        summary=f"No node of the platform{_WHERE} answers scrapes.",
        description=f"Nodes of the platform{_WHERE} answered within the last day and none does now. The platform is"
        " down, or Prometheus is kept from it; no other alert about its models can fire.",
    )
    yield Alert(
        "RoundhouseTargetDown",
        "warning",
        f'up{{job=~"{NODE_JOB}|{PLATFORM_JOB}|{CONTROLLER_JOB}"}} == 0',
        lasts="10m",
        when="one node or controller has not answered scrapes for 10 minutes",
        summary="{{ $labels.job }} at {{ $labels.instance }}" + _WHERE + " does not answer scrapes.",
        description="{{ $labels.job }} at {{ $labels.instance }}"
        + _WHERE
        + " has not answered a scrape for 10 minutes: up is"
        " {{ $value }}.",
    )
    yield Alert(
        "RoundhouseSpansDropped",
        "warning",
        f"{_increase(spans, dropped, '15m', by='namespace')}"
        f"\n/ {_increase(spans, '', '15m', by='namespace')} > 0.01"
        f"\nand {_increase(spans, dropped, '15m', by='namespace')} >= 100",
        lasts="15m",
        when="more than 1 % of the spans, and a hundred, were dropped in 15 minutes",
        summary=f"Spans{_WHERE} are dropped.",
        description=f"{_PERCENT} of the spans{_WHERE} were dropped rather than exported: traces have holes.",
    )


#: Name of a group -> its rules. What one rule records, those after it in the group read in the same round.
GROUPS: dict[str, tuple[Recording | Alert, ...]] = {
    "roundhouse-objectives": (*_objective_recordings(), *_budget_alerts()),
    "roundhouse-models": (*_model_recordings(), *_model_alerts()),
    "roundhouse-platform": tuple(_platform_alerts()),
}
ALERTS = tuple(rule for rules in GROUPS.values() for rule in rules if isinstance(rule, Alert))
RECORDINGS = tuple(rule for rules in GROUPS.values() for rule in rules if isinstance(rule, Recording))


def rules_yaml(*, runbooks: str = "docs/runbooks") -> str:
    """Return a file of rules as Prometheus loads it.

    Args:
        runbooks: URL of the folder of the runbooks, for the alerts' `runbook_url`.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        """Keeps the lines of an expression."""

    def text(dumper: yaml.SafeDumper, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    groups = [
        {"name": name, "rules": [rule.as_rule(runbooks=runbooks) for rule in rules]} for name, rules in GROUPS.items()
    ]
    return yaml.dump({"groups": groups}, Dumper=Dumper, sort_keys=False, width=1000)


def markdown_table() -> str:
    """Return the table of docs/alerts.md."""
    lines = ["| alert | severity | fires when |", "|---|---|---|"]
    lines += [f"| [{one.name}](runbooks/{one.page}) | {one.severity} | {one.when} |" for one in ALERTS]
    return "\n".join(lines) + "\n"
