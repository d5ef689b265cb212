"""Why there are as many replicas as there are: what was wanted, what there was, what decided, and what room is left."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from charts.dashboards.parts import Column, Look, Panel, Query, board, event, model_variable, rows_of, series

_OF = 'model=~"$model"'
#: One process tells the state of the whole cluster; where several do, they tell the same.
_REAL = f'max by (model, state) (roundhouse_scaling_replicas{{{_OF},state!="wanted"}})'
_WANTED = f'max by (model) (roundhouse_scaling_replicas{{{_OF},state="wanted"}})'
_READY = f'max by (model) (roundhouse_scaling_replicas{{{_OF},state="ready"}})'
_LOAD = f"max by (model) (roundhouse_scaling_load{{{_OF}}})"
_TARGET = f"max by (model) (roundhouse_scaling_target{{{_OF}}})"
_DECISIONS = f"roundhouse_scaling_decisions_total{{{_OF}}}"
_LOOKS = {
    "ready": Look("green"),
    "starting": Look("yellow"),
    "draining": Look("orange"),
    "wanted": Look("blue", "dash"),
    "asked for by the load": Look("purple", "dash"),
    "min": Look("text", "dot"),
    "max": Look("text", "dot"),
}


def scaling() -> Dashboard:
    """Return the dashboard that says why it scaled."""
    return board(
        "Scaling",
        "Wanted against real replicas, the signals that decided, and the room that is left. A mark on the panels is a "
        "decision. Choose one model to read its story.",
        {"Replicas": _replicas(), "What decided": _signals(), "Starts": _starts(), "Room": _room()},
        variables=[model_variable(with_all=True)],
        events=[
            event(
                "Decisions",
                f"sum by (model, direction, reason) (increase({_DECISIONS}[1m])) > 0",
                "{{model}} {{direction}}: {{reason}}",
                color="purple",
                step="15s",
            )
        ],
    )


def _replicas() -> list[Panel]:
    return [
        series(
            "Wanted against real",
            "Replicas that are ready, starting and draining, one upon the other, and as a dashed line how many are "
            "wanted. The gap between the line and the green is what callers wait for. Yellow that stays: a model loads "
            "for long or has no room, see Starts and Room. The line above the green with no yellow: nothing could be "
            "placed.",
            Query(f"sum by (state) ({_REAL})", "{{state}}"),
            Query(f"sum({_WANTED})", "wanted"),
            unit="none",
            width=24,
            stacked=True,
            steps=True,
            looks=_LOOKS,
        ),
        series(
            "Wanted by model",
            "How many replicas each model should have. A saw of ups and downs: its target is too near to its usual "
            "load.",
            Query(_WANTED, "{{model}}"),
            unit="none",
            steps=True,
        ),
        series(
            "Phases of the replicas",
            "What the replica processes themselves say that they do. downloading or loading for minutes is a slow "
            "source or large weights; failed says that the model's log holds an error.",
            Query(f"sum by (phase) (roundhouse_model_phase{{{_OF}}}) > 0", "{{phase}}"),
            unit="none",
            stacked=True,
            steps=True,
            looks={
                "ready": Look("green"),
                "failed": Look("red"),
                "draining": Look("orange"),
                "loading": Look("yellow"),
            },
        ),
    ]


def _signals() -> list[Panel]:
    return [
        series(
            "Load of a ready replica against its target",
            "Requests in flight for each ready replica as the policy saw them, and the number that it aims at. Above "
            "its target a model is given replicas, below it loses some. Above for long: the maximum holds it, or "
            "nothing starts.",
            Query(f"{_LOAD} / clamp_min({_READY}, 1)", "{{model}} load"),
            Query(_TARGET, "{{model}} target"),
            unit="none",
        ),
        series(
            "What the load asks for",
            "Load divided by target is how many replicas the load asks for; wanted follows it between min and max, "
            "after the delays that keep it calm. asked above max: raise scaling.max_replicas, or refuse less important "
            "callers.",
            Query(f"sum(ceil({_LOAD} / {_TARGET}))", "asked for by the load"),
            Query(f"sum({_WANTED})", "wanted"),
            Query(f"sum by (bound) (max by (model, bound) (roundhouse_scaling_bound{{{_OF}}}))", "{{bound}}"),
            unit="none",
            steps=True,
            looks={**_LOOKS, "asked for by the load": Look("purple")},
        ),
        rows_of(
            "Decisions",
            "How often each model was given (up) or lost (down) replicas in this time range, and why: load is the "
            "policy, idle is that nobody asked, bound is that the declaration changed. Many of both directions: raise "
            "the target, or min_replicas.",
            Column(
                Query(f"round(sum by (model, direction, reason) (increase({_DECISIONS}[$__range]))) > 0", "decisions"),
                "none",
                decimals=0,
            ),
            labels=["model", "direction", "reason"],
            empty="No decision in this time range",
        ),
    ]


def _starts() -> list[Panel]:
    return [
        series(
            "Cold starts",
            "Replicas that became ready, for each interval. Starts without a decision beside them are replacements of "
            "replicas that died: look into the model's log.",
            Query(f"sum by (model) (increase(roundhouse_cold_starts_total{{{_OF}}}[$__rate_interval]))", "{{model}}"),
            unit="none",
            bars=True,
        ),
        series(
            "Length of a cold start",
            "Mean time from the beginning of a load to ready, of all starts since the platform began. It is how late "
            "a new replica helps: if peaks are shorter, keep min_replicas higher.",
            Query(
                f"sum by (model) (roundhouse_cold_start_duration_seconds_sum{{{_OF}}}) / "
                f"sum by (model) (roundhouse_cold_start_duration_seconds_count{{{_OF}}})",
                "{{model}}",
            ),
            unit="s",
        ),
    ]


def _room() -> list[Panel]:
    free = 'max by (resource) (roundhouse_cluster_capacity{state="free"})'
    total = '(max by (resource) (roundhouse_cluster_capacity{state="total"}) > 0)'
    return [
        series(
            "Free share of the cluster",
            "What no replica has been promised, of the processors, the memory and the GPUs. At 0 the next replica "
            "waits for another to go, or for a node: add one, or lower resources and max_replicas.",
            Query(f"{free} / {total}", "{{resource}}"),
            unit="percentunit",
            most=1,
        ),
        series(
            "Free processors",
            "Cores that no replica has been promised, and all of them. A model fits where its resources.cpus are free "
            "on one node.",
            Query('max by (state) (roundhouse_cluster_capacity{resource="cpu"})', "{{state}}"),
            unit="none",
            looks={"free": Look("green"), "total": Look("text", "dot")},
        ),
    ]
