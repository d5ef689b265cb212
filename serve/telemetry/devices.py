"""A machine's GPUs as NVIDIA's library sees them, asked when metrics are: nobody has to record them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from serve.telemetry import instruments as named
from serve.telemetry.instruments import DEVICES, Sample


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU.

    Args:
        number: NVML's, of `serve.telemetry.instruments.DEVICES`.
        used_bytes, size_bytes: Of its memory.
        utilization: Share of the last moments in which something ran on it, 0 to 1; None where it is not told, as of a
            GPU that is cut into parts.
    """

    number: str
    used_bytes: float
    size_bytes: float
    utilization: float | None


class Gpus:
    """The GPUs of this machine; none where the library is not installed.

    Args:
        binding: Returns the module `pynvml`; called once, before the first reading.
    """

    def __init__(self, binding: Callable[[], Any]) -> None:
        self._binding = binding

    def read(self) -> Sequence[Device]:
        """Return every GPU that can be read, as it is now."""
        nvml = self._started
        if nvml is None:
            return []
        try:
            return list(_devices(nvml))
        except nvml.NVMLError:
            return []

    @functools.cached_property
    def _started(self) -> Any:
        """Return the library, started once for the process; None where there is none."""
        nvml = self._binding()
        try:
            nvml.nvmlInit()
        except nvml.NVMLError:
            return None
        return nvml


def _devices(nvml: Any) -> Iterator[Device]:
    for number, _ in zip(DEVICES, range(nvml.nvmlDeviceGetCount()), strict=False):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(int(number))
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError:
            continue
        yield Device(number, float(memory.used), float(memory.total), _utilization(nvml, handle))


def _utilization(nvml: Any, handle: Any) -> float | None:
    try:
        return float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except nvml.NVMLError:
        return None


def device_samples(devices: Sequence[Device]) -> Iterator[Sample]:
    """Yield what metrics tell of GPUs."""
    for device in devices:
        if device.utilization is not None:
            yield Sample(named.DEVICE_UTILIZATION, "", (device.number,), device.utilization)
        yield Sample(named.DEVICE_MEMORY_USED, "", (device.number,), device.used_bytes)
        yield Sample(named.DEVICE_MEMORY_SIZE, "", (device.number,), device.size_bytes)
