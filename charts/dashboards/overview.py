"""The fleet on one page: is anybody being failed, where, and is there room."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from charts.dashboards.parts import FAULTS, Column, Panel, Query, Step, board, rows_of, series, single

_RATE = "[$__rate_interval]"
_FAILED = f'roundhouse_requests_total{{outcome=~"{FAULTS}"}}'
_SECONDS = 'roundhouse_request_duration_seconds_bucket{status="ok"}'
#: 0 is no promise.
_PROMISED = "(max by (model, objective) (roundhouse_objective_target) > 0)"
_READY = 'max by (model) (roundhouse_scaling_replicas{state="ready"})'
_WANTED = 'max by (model) (roundhouse_scaling_replicas{state="wanted"})'


def overview() -> Dashboard:
    """Return the dashboard to begin with."""
    return board(
        "Overview",
        "Every model at a glance. Begin here, then open Model for one that looks wrong, or Scaling for its replicas.",
        {
            "Now": _now(),
            "Requests": _requests(),
            "Replicas and room": _room(),
            "Objectives": _objectives(),
            "Models": _models(),
        },
    )


def _now() -> list[Panel]:
    return [
        single(
            "Requests a second",
            "Requests that replicas have finished, well or not. A sudden fall means that callers or the way to the "
            "replicas broke: look at Errors at the gateway.",
            Query(f"sum(rate(roundhouse_requests_total{_RATE}))", "requests"),
            unit="reqps",
        ),
        single(
            "Failed share",
            "Share of requests that failed for a reason that is not the caller's. Above 1 %: see Errors by outcome for "
            "which model and why.",
            Query(f"sum(rate({_FAILED}{_RATE})) / (sum(rate(roundhouse_requests_total{_RATE})) > 0)", "failed"),
            unit="percentunit",
            steps=[Step(0.01, "orange"), Step(0.05, "red")],
            empty="No requests",
        ),
        single(
            "99th percentile",
            "The time that all but 1 % of the answered requests took at their replica, all models together. When it "
            "grows, Duration by model tells whose it is.",
            Query(f"histogram_quantile(0.99, sum by (le) (rate({_SECONDS}{_RATE})))", "p99"),
            unit="s",
            empty="No requests",
        ),
        single(
            "Replicas ready of wanted",
            "Fewer ready than wanted for minutes: a model does not load or finds no room. Scaling shows which.",
            Query(f"sum({_READY})", "ready"),
            Query(f"sum({_WANTED})", "wanted"),
            unit="none",
            decimals=0,
        ),
        single(
            "Waiting",
            "Items and streams that wait for a model. It should go back to 0 between peaks; if it only grows, a model "
            "has too few replicas.",
            Query("sum(roundhouse_queue_depth)", "waiting"),
            unit="none",
            decimals=0,
        ),
        single(
            "Memory",
            "Main memory of all replicas. If it climbs while the number of replicas does not, see Memory by model.",
            Query("sum(roundhouse_process_memory_bytes)", "memory"),
            unit="bytes",
        ),
    ]


def _requests() -> list[Panel]:
    return [
        series(
            "Requests by model",
            "Requests a second that each model's replicas have finished. A model that falls to 0 while callers still "
            "ask is not ready or not reachable.",
            Query(f"sum by (model) (rate(roundhouse_requests_total{_RATE}))", "{{model}}"),
            unit="reqps",
        ),
        series(
            "Failed share by model",
            "Share of each model's requests that failed for a reason that is not the caller's. Open Model for one that "
            "rises.",
            Query(
                f"sum by (model) (rate({_FAILED}{_RATE})) / "
                f"(sum by (model) (rate(roundhouse_requests_total{_RATE})) > 0)",
                "{{model}}",
            ),
            unit="percentunit",
            empty="No requests",
        ),
        series(
            "Duration by model",
            "Half and all but 1 % of the answered requests were this fast. If only p99 rises, requests wait: look at "
            "Waiting by model. If both rise, the model itself has become slower, or its requests longer.",
            Query(f"histogram_quantile(0.5, sum by (model, le) (rate({_SECONDS}{_RATE})))", "{{model}} p50"),
            Query(f"histogram_quantile(0.99, sum by (model, le) (rate({_SECONDS}{_RATE})))", "{{model}} p99"),
            unit="s",
            empty="No requests",
        ),
        series(
            "Errors by outcome",
            "What replicas answered instead of a result. invalid_value and other words about the request are the "
            "caller's to mend; overloaded wants replicas; prediction_failed and internal_error are in the model's log.",
            Query(
                f'sum by (model, outcome) (rate(roundhouse_requests_total{{outcome!="ok"}}{_RATE})) > 0',
                "{{model}} {{outcome}}",
            ),
            unit="reqps",
            empty="No errors",
        ),
        series(
            "Errors at the gateway",
            "Errors of requests that came through the gateway; those that it passed on are in Errors by outcome too. "
            "model_not_found is a wrong name, model_not_ready a model that loads or failed to, replica_lost a replica "
            "that died with the request.",
            Query(
                # An empty label is none to Prometheus, and a legend would say `model` in its place.
                "label_replace("
                f'sum by (model, outcome) (rate(roundhouse_gateway_requests_total{{outcome!="ok"}}{_RATE})) > 0, '
                '"model", "no model", "model", "")',
                "{{model}} {{outcome}}",
            ),
            unit="reqps",
            empty="No errors",
        ),
        series(
            "Turned away",
            "Items and streams that were not let into a queue, and those given up before their answer. queue_full and "
            "expired: more replicas, or a longer queue. cancelled: callers have less patience than the model needs.",
            Query(f"sum by (model, reason) (rate(roundhouse_rejected_total{_RATE})) > 0", "{{model}} {{reason}}"),
            Query(f"sum by (model, reason) (rate(roundhouse_dropped_total{_RATE})) > 0", "{{model}} {{reason}}"),
            unit="ops",
            empty="Nothing was turned away",
        ),
    ]


def _room() -> list[Panel]:
    return [
        series(
            "Ready against wanted",
            "Replicas that answer, and how many there should be. A gap that stays: see the model's Loads, and the "
            "cluster's room on Scaling.",
            Query(_READY, "{{model}} ready"),
            Query(_WANTED, "{{model}} wanted"),
            unit="none",
            steps=True,
        ),
        series(
            "Waiting by model",
            "Items and streams that wait, in all of a model's replicas. A queue that never empties wants more replicas "
            "or larger batches.",
            Query("sum by (model) (roundhouse_queue_depth)", "{{model}}"),
            unit="none",
        ),
        series(
            "Memory by model",
            "Main memory of each model's replicas. It steps with their number; a slope without a step is a leak in the "
            "model's code.",
            Query("sum by (model) (roundhouse_process_memory_bytes)", "{{model}}"),
            unit="bytes",
            stacked=True,
            width=24,
        ),
    ]


def _objectives() -> list[Panel]:
    return [
        series(
            "Burn of the error budgets",
            "How many times faster than allowed each objective's budget is spent, over five minutes and over an hour. "
            "Above 1 for long, the promise is broken; 14 over an hour spends a month's budget in two days.",
            Query(_burn("5m"), "{{model}} {{objective}} 5m"),
            Query(_burn("1h"), "{{model}} {{objective}} 1h"),
            unit="none",
            width=24,
            empty="No requests, or nothing is promised",
        )
    ]


def _burn(window: str) -> str:
    missed = f'sum by (model, objective) (rate(roundhouse_objective_requests_total{{result="missed"}}[{window}]))'
    counted = f"(sum by (model, objective) (rate(roundhouse_objective_requests_total[{window}])) > 0)"
    return f"{missed} / {counted} / (1 - {_PROMISED})"


def _models() -> list[Panel]:
    failed = f"sum by (model) (rate({_FAILED}[5m])) / (sum by (model) (rate(roundhouse_requests_total[5m])) > 0)"
    seconds = f"histogram_quantile(0.99, sum by (model, le) (rate({_SECONDS}[5m])))"
    return [
        rows_of(
            "Models",
            "Each model in the last five minutes. Sort by a column to find the slowest or the largest; a model that is "
            "declared and missing here has no replica that ever began.",
            Column(Query("sum by (model) (rate(roundhouse_requests_total[5m]))", "requests"), "reqps"),
            Column(Query(failed, "failed"), "percentunit"),
            Column(Query(seconds, "p99"), "s"),
            Column(Query(_READY, "ready"), "none", decimals=0),
            Column(Query(_WANTED, "wanted"), "none", decimals=0),
            Column(Query("sum by (model) (roundhouse_process_memory_bytes)", "memory"), "bytes"),
            labels=["model"],
        )
    ]
