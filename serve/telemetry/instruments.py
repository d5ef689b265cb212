"""Every instrument, named in one place, so that dashboards, documents and code cannot mean different things by a name.

Names and units are OpenTelemetry's; `Instrument.exposed_name` is what its rules make of them for Prometheus. The values
of every label are listed here. A model's name is the only label besides, and comes from the declaration: nothing that a
client sends becomes a label.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple

#: UCUM units and the words that Prometheus's names end with; an annotation such as `{item}` adds none.
UNIT_WORDS = {"s": "seconds", "By": "bytes"}

PROTOCOLS = ("open_inference", "openai")
#: `ok`, and the codes of `serve.api.errors`; a test holds the two lists together.
OUTCOMES = (
    "ok",
    "unsupported_parameter",
    "payload_too_large",
    "unsupported_media_type",
    "invalid_value",
    "model_not_found",
    "not_found",
    "method_not_allowed",
    "overloaded",
    "client_closed_request",
    "model_not_ready",
    "replica_lost",
    "deadline_exceeded",
    "prediction_failed",
    "internal_error",
)
#: Outcomes that are no doing of the caller.
FAULTS = frozenset({
    "overloaded", "model_not_ready", "replica_lost", "deadline_exceeded", "prediction_failed", "internal_error",
})  # fmt: skip
STATUSES = ("ok", "error")
KINDS = ("item", "stream")
OBJECTIVES = ("availability", "latency")
RESULTS = ("met", "missed")
LOAD_PHASES = ("downloading", "loading", "warming")
PHASES = ("queued", *LOAD_PHASES, "ready", "draining", "failed")
REQUEST_PHASES = ("read", "prepare", "queue", "compute", "respond")
#: The GPUs of a machine that are told of; none has more.
DEVICES = tuple(map(str, range(16)))

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
_TOKEN_SECONDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_LOAD_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_SIZES = tuple(float(2**power) for power in range(13))


@dataclass(frozen=True, slots=True)
class Instrument:
    """One thing that is measured.

    Args:
        name: OpenTelemetry's.
        unit: UCUM.
        labels: Label -> all its values; `model` comes with every instrument and is not among them.
        bounds: Upper bounds of a histogram's buckets, in the unit; infinity is not among them.
        exemplars: Whether a bucket keeps the trace of the last request in it.
        merged: What a gauge is of several processes: their sum, or the largest where each tells the same.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    description: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    bounds: tuple[float, ...] = ()
    exemplars: bool = False
    merged: Literal["sum", "max"] = "sum"

    @property
    def exposed_name(self) -> str:
        """Return Prometheus's name, without the `_total` that a counter's samples end with."""
        word = UNIT_WORDS.get(self.unit)
        name = self.name.replace(".", "_")
        return f"{name}_{word}" if word else name

    def series(self) -> Iterator[tuple[str, ...]]:
        """Yield each combination of the labels' values."""
        return itertools.product(*self.labels.values())


class Sample(NamedTuple):
    """A number that no page holds.

    Args:
        instrument: Of `FOUND`.
        model: May be empty.
        values: Of the labels, in the instrument's order.
    """

    instrument: Instrument
    model: str
    values: tuple[str, ...]
    number: float


REQUESTS = Instrument(
    "roundhouse.requests",
    "counter",
    "{request}",
    "Requests answered or given up by replicas, by outcome: `ok`, or the code of the error.",
    {"protocol": PROTOCOLS, "outcome": OUTCOMES},
)
REQUEST_DURATION = Instrument(
    "roundhouse.request.duration",
    "histogram",
    "s",
    "From a request's arrival at the replica to the last byte of its answer.",
    {"protocol": PROTOCOLS, "status": STATUSES},
    bounds=_SECONDS,
    exemplars=True,
)
PHASE_DURATION = Instrument(
    "roundhouse.request.phase.duration",
    "histogram",
    "s",
    "Where the time of answered requests went. `read`: body and items, until they are queued. `prepare`: the call that "
    "made the first item ready. `queue`: the rest of the wait for the model. `compute`: from the first item's batch, "
    "or the stream's slot, to the answer. `respond`: writing it. The middle three are of each stream where one "
    "request opens several.",
    {"phase": REQUEST_PHASES},
    bounds=_SECONDS,
)
QUEUE_DEPTH = Instrument(
    "roundhouse.queue.depth", "gauge", "{item}", "Items and streams that wait for the model.", {"kind": KINDS}
)
QUEUE_SIZE = Instrument(
    "roundhouse.queue.size", "gauge", "By", "Bytes of the requests whose items or streams wait.", {"kind": KINDS}
)
RUNNING = Instrument(
    "roundhouse.running", "gauge", "{item}", "Items in the batch that runs, and streams in slots.", {"kind": KINDS}
)
BATCH_SIZE = Instrument(
    "roundhouse.batch.size",
    "histogram",
    "{item}",
    "Items of each batch, and streams of each step.",
    {"kind": KINDS},
    bounds=_SIZES,
)
BATCH_DURATION = Instrument(
    "roundhouse.batch.duration",
    "histogram",
    "s",
    "Time of each batch or step; its sum is how long the model was busy.",
    {"kind": KINDS},
    bounds=_SECONDS,
)
COST_ASKED = Instrument(
    "roundhouse.batch.cost.asked",
    "counter",
    "{cost}",
    "Cost of the items in batches, in the task's own unit (tokens for text); only where batches are padded or bounded "
    "in cost.",
)
COST_COMPUTED = Instrument(
    "roundhouse.batch.cost.computed",
    "counter",
    "{cost}",
    "Cost of the batches as they were computed; what is beyond the cost asked is padding.",
)
REJECTED = Instrument(
    "roundhouse.rejected",
    "counter",
    "{item}",
    "Items and streams that were not let into the queue.",
    {"reason": ("queue_full", "queue_bytes_full", "not_ready")},
)
DROPPED = Instrument(
    "roundhouse.dropped",
    "counter",
    "{item}",
    "Items and streams given up before their answer, where they were then. `cancelled`: the caller left. `expired`: "
    "the deadline passed. `sibling`: another item of the request failed. `shutdown`: the replica ended.",
    {"reason": ("cancelled", "expired", "sibling", "shutdown"), "stage": ("queued", "running")},
)
TIME_TO_FIRST_TOKEN = Instrument(
    "roundhouse.time_to_first_token",
    "histogram",
    "s",
    "From a stream's arrival in the queue to its first part, whether it is sent in parts or whole.",
    bounds=_SECONDS,
)
INTER_TOKEN_LATENCY = Instrument(
    "roundhouse.inter_token_latency",
    "histogram",
    "s",
    "Between a stream's tokens after the first part, one observation a token.",
    bounds=_TOKEN_SECONDS,
)
TOKENS = Instrument(
    "roundhouse.tokens",
    "counter",
    "{token}",
    "Tokens generated (`output`), and of the prompts of finished streams (`input`).",
    {"type": ("input", "output")},
)
MODEL_PHASE = Instrument(
    "roundhouse.model.phase", "gauge", "{replica}", "Replica processes in each phase.", {"phase": PHASES}
)
LOAD_PHASE_DURATION = Instrument(
    "roundhouse.model.load.phase.duration",
    "histogram",
    "s",
    "Time of each phase of a model's load.",
    {"phase": LOAD_PHASES},
    bounds=_LOAD_SECONDS,
)
COLD_STARTS = Instrument("roundhouse.cold_starts", "counter", "{start}", "Loads of the model that ended with it ready.")
COLD_START_DURATION = Instrument(
    "roundhouse.cold_start.duration",
    "histogram",
    "s",
    "From the beginning of a load to the model's being ready.",
    bounds=_LOAD_SECONDS,
)
LOAD_FAILURES = Instrument(
    "roundhouse.model.load.failures",
    "counter",
    "{start}",
    "Loads that failed: the `source` could not be had, or the `model` did not load or warm up.",
    {"reason": ("source", "model")},
)
GATEWAY_REQUESTS = Instrument(
    "roundhouse.gateway.requests",
    "counter",
    "{request}",
    "Requests that came through the gateway or were answered by it, by outcome; those it passes on count at a replica "
    "too. `model` is empty where none was named that is declared.",
    {"protocol": PROTOCOLS, "outcome": OUTCOMES},
)
GATEWAY_REQUEST_DURATION = Instrument(
    "roundhouse.gateway.request.duration",
    "histogram",
    "s",
    "From a request's arrival at the gateway to the last byte of its answer.",
    {"protocol": PROTOCOLS, "status": STATUSES},
    bounds=_SECONDS,
    exemplars=True,
)
SPANS = Instrument(
    "roundhouse.telemetry.spans",
    "counter",
    "{span}",
    "Spans that the collector of traces took (`exported`), and that it did not take or that were too many to hold "
    "(`dropped`). A gateway counts them with an empty `model`.",
    {"result": ("exported", "dropped")},
)
OBJECTIVE_REQUESTS = Instrument(
    "roundhouse.objective.requests",
    "counter",
    "{request}",
    "Requests that kept what the declaration promises, and those that did not, each counted once, by the replica or by "
    "the gateway that answered for it. `availability`: every request but those that failed by the caller's own doing. "
    "`latency`: every answered request, where `objectives.latency_ms` is declared.",
    {"objective": OBJECTIVES, "result": RESULTS},
)
OBJECTIVE_TARGET = Instrument(
    "roundhouse.objective.target",
    "gauge",
    "1",
    "Share of the requests that is promised to be `met`, as declared; 0 where nothing is.",
    {"objective": OBJECTIVES},
    merged="max",
)
MEMORY = Instrument(
    "roundhouse.process.memory",
    "gauge",
    "By",
    "Main memory of the model's replica processes; what processes share is divided among them (PSS) where the system "
    "tells it, else it is counted in each (RSS).",
)
SCALING_REPLICAS = Instrument(
    "roundhouse.scaling.replicas",
    "gauge",
    "{replica}",
    "Replicas of the model on all machines: those that there are to be (`wanted`), and those that there are.",
    {"state": ("wanted", "starting", "ready", "draining")},
)
SCALING_BOUND = Instrument(
    "roundhouse.scaling.bound",
    "gauge",
    "{replica}",
    "The fewest and the most replicas that the declaration allows; where they are the same, nothing is decided.",
    {"bound": ("min", "max")},
)
SCALING_LOAD = Instrument(
    "roundhouse.scaling.load",
    "gauge",
    "{request}",
    "Ongoing requests of all replicas, their mean over the policy's window, as it last decided on them.",
)
SCALING_TARGET = Instrument(
    "roundhouse.scaling.target", "gauge", "{request}", "Ongoing requests that one replica should have."
)
SCALING_DECISIONS = Instrument(
    "roundhouse.scaling.decisions",
    "counter",
    "{decision}",
    "Changes of the number of replicas that there are to be: for more `load`, for less of it (`idle`), or because a "
    "`bound` of the declaration moved.",
    {"direction": ("up", "down"), "reason": ("load", "idle", "bound")},
)
CLUSTER_CAPACITY = Instrument(
    "roundhouse.cluster.capacity",
    "gauge",
    "1",
    "What all machines have, and what of it no replica has reserved: cores, GPUs, bytes of memory. `model` is empty.",
    {"resource": ("cpu", "gpu", "memory"), "state": ("total", "free")},
)
DEVICE_UTILIZATION = Instrument(
    "roundhouse.device.utilization",
    "gauge",
    "1",
    "Share of the last moments in which something ran on a GPU of this machine, 0 to 1. `model` is empty.",
    {"device": DEVICES},
)
DEVICE_MEMORY_USED = Instrument(
    "roundhouse.device.memory.used", "gauge", "By", "Used memory of a GPU; `model` is empty.", {"device": DEVICES}
)
DEVICE_MEMORY_SIZE = Instrument(
    "roundhouse.device.memory.size", "gauge", "By", "Memory of a GPU; `model` is empty.", {"device": DEVICES}
)

#: What a replica records.
REPLICA = (
    REQUESTS, REQUEST_DURATION, PHASE_DURATION, QUEUE_DEPTH, QUEUE_SIZE, RUNNING, BATCH_SIZE, BATCH_DURATION,
    COST_ASKED, COST_COMPUTED, REJECTED, DROPPED, TIME_TO_FIRST_TOKEN, INTER_TOKEN_LATENCY, TOKENS, MODEL_PHASE,
    LOAD_PHASE_DURATION, COLD_STARTS, COLD_START_DURATION, LOAD_FAILURES, OBJECTIVE_REQUESTS, OBJECTIVE_TARGET,
)  # fmt: skip
#: What a gateway records.
GATEWAY = (GATEWAY_REQUESTS, GATEWAY_REQUEST_DURATION, OBJECTIVE_REQUESTS)
#: What a process records that sends spans.
EXPORTER = (SPANS,)
#: Who records, and what: the first part of a page's file name.
ROLES: Mapping[str, tuple[Instrument, ...]] = MappingProxyType(
    {"replica": REPLICA, "gateway": GATEWAY, "exporter": EXPORTER}
)
#: Each once, whoever records it.
RECORDED = tuple({one.name: one for recorded in ROLES.values() for one in recorded}.values())
#: What nobody records: it is found out when it is asked for, and goes with its model.
FOUND = (
    SCALING_REPLICAS, SCALING_BOUND, SCALING_LOAD, SCALING_TARGET, SCALING_DECISIONS, CLUSTER_CAPACITY,
    DEVICE_UTILIZATION, DEVICE_MEMORY_USED, DEVICE_MEMORY_SIZE,
)  # fmt: skip
ALL = (*RECORDED, MEMORY, *FOUND)


def roles_of(instrument: Instrument) -> frozenset[str]:
    """Return who records an instrument."""
    return frozenset(role for role, recorded in ROLES.items() if instrument in recorded)


def markdown_table() -> str:
    """Return the table of docs/metrics.md."""
    lines = ["| name | kind | unit | labels beside `model` | meaning |", "|---|---|---|---|---|"]
    for one in ALL:
        name = f"{one.exposed_name}_total" if one.kind == "counter" else one.exposed_name
        labels = "<br>".join(f"`{label}`: {', '.join(values)}" for label, values in one.labels.items())
        kind = f"{one.kind}, exemplars" if one.exemplars else one.kind
        buckets = f" Buckets up to {', '.join(f'{bound:g}' for bound in one.bounds)}." if one.bounds else ""
        lines.append(f"| `{name}` | {kind} | {one.unit} | {labels} | {one.description}{buckets} |")
    return "\n".join(lines) + "\n"
