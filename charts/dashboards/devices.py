"""The GPUs and the memory: what is full, and whose it is."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from charts.dashboards.parts import NO_GPU, Look, Panel, Query, board, note, series


def devices() -> Dashboard:
    """Return the dashboard of the GPUs and the memory."""
    return board(
        "Devices",
        "GPUs by device, and memory by model. Without a GPU the upper panels have no data.",
        {"GPUs": _gpus(), "Main memory": _memory()},
    )


def _gpus() -> list[Panel]:
    used = "max by (instance, device) (roundhouse_device_memory_used_bytes)"
    size = "max by (instance, device) (roundhouse_device_memory_size_bytes)"
    return [
        note(
            "Read this first",
            f"These panels are of the GPUs of each machine. Where a machine has none they say “{NO_GPU}”, and nothing "
            "is wrong.",
        ),
        series(
            "Utilisation by device",
            "Share of the time in which a GPU computed something. Low beside a long queue: batches are too small, or "
            "the processor that prepares them is the bottleneck. At 100 % with a queue: another GPU.",
            Query("max by (instance, device) (roundhouse_device_utilization)", "{{instance}} GPU {{device}}"),
            unit="percentunit",
            width=8,
            most=1,
            empty=NO_GPU,
        ),
        series(
            "Memory by device",
            "Memory of each GPU that is taken, by whomever. Near its size, the next model does not load: give a model "
            "a GPU of its own, or a smaller dtype.",
            Query(used, "{{instance}} GPU {{device}}"),
            Query(size, "{{instance}} GPU {{device}} size"),
            unit="bytes",
            width=8,
            empty=NO_GPU,
        ),
        series(
            "Taken share by device",
            "The same as a share of each GPU's memory. A step down without a replica that left is a process that died.",
            Query(f"{used} / {size}", "{{instance}} GPU {{device}}"),
            unit="percentunit",
            width=8,
            most=1,
            empty=NO_GPU,
        ),
    ]


def _memory() -> list[Panel]:
    return [
        series(
            "Memory by model",
            "Main memory of each model's replicas; what they share is divided among them. Near the machine's, the "
            "system ends the largest process: declare resources.memory so that Ray places no more than fits.",
            Query("sum by (model) (roundhouse_process_memory_bytes)", "{{model}}"),
            unit="bytes",
            stacked=True,
        ),
        series(
            "Promised memory",
            "Memory that no replica has been promised by resources.memory, and all of it. It may be far from what is "
            "used: a model's promise should be what it takes under load.",
            Query('max by (state) (roundhouse_cluster_capacity{resource="memory"})', "{{state}}"),
            unit="bytes",
            looks={"free": Look("green"), "total": Look("text", "dot")},
        ),
    ]
