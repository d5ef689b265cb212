"""One model from its callers' side to its batches: where the time of its requests goes."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from charts.dashboards.parts import FAULTS, Look, Panel, Query, board, model_variable, series

_OF = 'model="$model"'
_RATE = "[$__rate_interval]"
_NO_STREAMS = "This model streams no text"
_NO_REQUESTS = "No requests"


def model() -> Dashboard:
    """Return the dashboard of one model."""
    return board(
        "Model",
        "One model: its requests, where their time goes, its batches, its streams, its loads.",
        {
            "Requests": _requests(),
            "Where the time goes": _time(),
            "Batches": _batches(),
            "Streams": _streams(),
            "Loads and memory": _loads(),
        },
        variables=[model_variable(with_all=False)],
    )


def _quantiles(metric: str, *shares: float, more: str = "", exemplars: bool = False) -> list[Query]:
    """Return a query for each share; the largest one has the exemplars."""
    return [
        Query(
            f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket{{{_OF}{more}}}{_RATE})))",
            f"p{share * 100:g}",
            exemplars=exemplars and share == max(shares),
        )
        for share in shares
    ]


def _mean(metric: str, by: str, more: str = "") -> str:
    sums, counts = (f"sum by ({by}) (rate({metric}_{part}{{{_OF}{more}}}{_RATE}))" for part in ("sum", "count"))
    return f"{sums} / {counts}"


def _requests() -> list[Panel]:
    failed = f'sum(rate(roundhouse_requests_total{{{_OF},outcome=~"{FAULTS}"}}{_RATE}))'
    return [
        series(
            "Requests by outcome",
            "Requests a second that the replicas finished, by outcome: ok, or the code of the error. docs/api.md tells "
            "what each code means and who can mend it.",
            Query(
                f"sum by (outcome) (rate(roundhouse_requests_total{{{_OF}}}{_RATE})) > 0",
                "{{outcome}}",
            ),
            unit="reqps",
            width=8,
            stacked=True,
            empty=_NO_REQUESTS,
            looks={"ok": Look("green")},
        ),
        series(
            "Failed share",
            "Share of the requests that failed for a reason that is not the caller's. Anything that stays above 0 is "
            "worth a look into the model's log.",
            Query(f"{failed} / (sum(rate(roundhouse_requests_total{{{_OF}}}{_RATE})) > 0)", "failed"),
            unit="percentunit",
            width=8,
            empty=_NO_REQUESTS,
            looks={"failed": Look("red")},
        ),
        series(
            "Duration",
            "How long answered requests took at the replica. A dot is one traced request: open it to see its trace. "
            "p99 far above p50 means that some requests wait, or that some are much larger.",
            *_quantiles("roundhouse_request_duration_seconds", 0.5, 0.9, 0.99, more=',status="ok"', exemplars=True),
            unit="s",
            width=8,
            empty=_NO_REQUESTS,
        ),
    ]


def _time() -> list[Panel]:
    phases = f"sum by (phase) (rate(roundhouse_request_phase_duration_seconds_sum{{{_OF}}}{_RATE}))"
    answered = f'sum(rate(roundhouse_request_phase_duration_seconds_count{{{_OF},phase="respond"}}{_RATE}))'
    return [
        series(
            "A mean request by phase",
            "Where an answered request spends its time; the phases add up. Much queue wants replicas or larger "
            "batches, much compute a faster device, much read or respond smaller bodies, much prepare lighter items.",
            Query(f"{phases} / scalar({answered} > 0)", "{{phase}}"),
            unit="s",
            stacked=True,
            empty=_NO_REQUESTS,
        ),
        series(
            "Wait for the model",
            "How long items and streams waited before they were computed. When p99 nears the deadline, requests "
            "begin to expire: add replicas.",
            *_quantiles("roundhouse_request_phase_duration_seconds", 0.5, 0.99, more=',phase="queue"'),
            unit="s",
            empty=_NO_REQUESTS,
        ),
        series(
            "Waiting and running",
            "Items and streams that wait, and those that are computed now, in all replicas. Waiting without end beside "
            "few running: batches are too small, see max_batch_size and max_batch_cost.",
            Query(f"sum by (kind) (roundhouse_queue_depth{{{_OF}}})", "{{kind}} waiting"),
            Query(f"sum by (kind) (roundhouse_running{{{_OF}}})", "{{kind}} running"),
            unit="none",
            width=8,
        ),
        series(
            "Bytes that wait",
            "Size of the requests in the queues. Near batching.max_queue_bytes, requests are refused.",
            Query(f"sum by (kind) (roundhouse_queue_size_bytes{{{_OF}}})", "{{kind}}"),
            unit="bytes",
            width=8,
        ),
        series(
            "Turned away",
            "Items and streams that were not let in, or given up before their answer. queue_full and expired want "
            "replicas; cancelled says that callers leave first.",
            Query(f"sum by (reason) (rate(roundhouse_rejected_total{{{_OF}}}{_RATE})) > 0", "{{reason}}"),
            Query(
                f"sum by (reason, stage) (rate(roundhouse_dropped_total{{{_OF}}}{_RATE})) > 0", "{{reason}} {{stage}}"
            ),
            unit="ops",
            width=8,
            empty="Nothing was turned away",
        ),
    ]


def _batches() -> list[Panel]:
    busy = f"sum by (kind) (rate(roundhouse_batch_duration_seconds_sum{{{_OF}}}{_RATE}))"
    ready = f'sum(roundhouse_model_phase{{{_OF},phase="ready"}})'
    asked, computed = (
        f"sum(rate(roundhouse_batch_cost_{which}_total{{{_OF}}}{_RATE}))" for which in ("asked", "computed")
    )
    return [
        series(
            "Size of a batch",
            "Mean number of items in a batch, and of streams in a step. Near 1 under load: nothing gathers, raise "
            "max_batch_size or max_wait_ms. At max_batch_size always: the model is full.",
            Query(_mean("roundhouse_batch_size", "kind"), "{{kind}}"),
            unit="none",
            width=8,
            empty=_NO_REQUESTS,
        ),
        series(
            "Busy",
            "Share of its time that a ready replica computes. Near 100 % its queue grows with every request more; far "
            "below with a queue, batches wait for company too long.",
            Query(f"{busy} / scalar({ready} > 0)", "{{kind}}"),
            unit="percentunit",
            width=8,
            most=1,
        ),
        series(
            "Padding",
            "Share of what was computed that nobody asked for, because short items were padded to the longest of their "
            "batch. A lot: lower max_batch_cost, or send items of like length together.",
            Query(f"1 - {asked} / ({computed} > 0)", "padding"),
            unit="percentunit",
            width=8,
            empty="This model pads nothing",
        ),
    ]


def _streams() -> list[Panel]:
    return [
        series(
            "Tokens a second",
            "Tokens generated, and of the prompts that were read. When output falls while streams wait, the model has "
            "slowed down: look at Time between tokens.",
            Query(f"sum by (type) (rate(roundhouse_tokens_total{{{_OF}}}{_RATE}))", "{{type}}"),
            unit="tok/s",
            width=8,
        ),
        series(
            "Time to the first token",
            "From a stream's arrival to its first part. It grows with the queue and with long prompts: add replicas or "
            "slots.",
            *_quantiles("roundhouse_time_to_first_token_seconds", 0.5, 0.99),
            unit="s",
            width=8,
            empty=_NO_STREAMS,
        ),
        series(
            "Time between tokens",
            "Between the tokens of a stream after its first part. It grows with the number of streams in slots: lower "
            "options.slots if readers find it slow.",
            *_quantiles("roundhouse_inter_token_latency_seconds", 0.5, 0.99),
            unit="s",
            width=8,
            empty=_NO_STREAMS,
        ),
    ]


def _loads() -> list[Panel]:
    spent = f"sum by (phase) (roundhouse_model_load_phase_duration_seconds_sum{{{_OF}}})"
    counted = f"sum by (phase) (roundhouse_model_load_phase_duration_seconds_count{{{_OF}}})"
    return [
        series(
            "A mean load by phase",
            "Where the time of a replica's start goes, over all starts since the platform began. downloading: keep the "
            "cache on a volume. loading: smaller or converted weights. warming: a lighter example.",
            Query(f"{spent} / {counted}", "{{phase}}"),
            unit="s",
            width=6,
            stacked=True,
        ),
        series(
            "Replicas by phase",
            "What the replica processes say that they do. failed stays until the declaration is mended; its reason is "
            "in `roundhouse status`.",
            Query(f"sum by (phase) (roundhouse_model_phase{{{_OF}}}) > 0", "{{phase}}"),
            unit="none",
            width=6,
            stacked=True,
            steps=True,
            looks={"ready": Look("green"), "failed": Look("red")},
        ),
        series(
            "Loads that failed",
            "Loads that did not end with a ready model, for each interval. source: the files could not be had. model: "
            "they were had and did not load.",
            Query(f"sum by (reason) (increase(roundhouse_model_load_failures_total{{{_OF}}}{_RATE}))", "{{reason}}"),
            unit="none",
            width=6,
            bars=True,
        ),
        series(
            "Memory",
            "Main memory of the model's replicas. It steps with their number; a slope without a step is a leak.",
            Query(f"sum(roundhouse_process_memory_bytes{{{_OF}}})", "memory"),
            unit="bytes",
            width=6,
        ),
    ]
