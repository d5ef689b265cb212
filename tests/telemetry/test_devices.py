"""GPUs as a library says they are that fails as NVIDIA's does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from serve.telemetry.devices import Device, Gpus
from serve.telemetry.instruments import DEVICES


class Nvml:
    """A machine's GPUs: each its memory (used, total) and its utilization in percent; None where that is refused."""

    class NVMLError(Exception):
        pass

    def __init__(self, *gpus: tuple[tuple[int, int] | None, int | None], is_installed: bool = True) -> None:
        self.gpus = gpus
        self.is_installed = is_installed
        self.starts = 0

    def nvmlInit(self) -> None:
        self.starts += 1
        if not self.is_installed:
            raise self.NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return self.gpus[index]

    def nvmlDeviceGetMemoryInfo(self, gpu: Any) -> Any:
        if gpu[0] is None:
            raise self.NVMLError("GPU is lost")
        return SimpleNamespace(used=gpu[0][0], total=gpu[0][1])

    def nvmlDeviceGetUtilizationRates(self, gpu: Any) -> Any:
        if gpu[1] is None:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=gpu[1])


def test_each_gpu_has_its_memory_and_its_utilization():
    nvml = Nvml(((10, 80), 100), ((0, 80), 0))
    assert Gpus(lambda: nvml).read() == [Device("0", 10.0, 80.0, 1.0), Device("1", 0.0, 80.0, 0.0)]


def test_a_gpu_that_is_cut_into_parts_tells_no_utilization_and_a_lost_one_nothing():
    nvml = Nvml((None, 5), ((10, 80), None))
    assert Gpus(lambda: nvml).read() == [Device("1", 10.0, 80.0, None)]


def test_without_the_library_there_is_none_and_it_is_not_looked_for_again():
    nvml = Nvml(((10, 80), 1), is_installed=False)
    gpus = Gpus(lambda: nvml)
    assert (gpus.read(), gpus.read(), nvml.starts) == ([], [], 1)


def test_a_driver_that_fails_later_leaves_the_scrape_whole():
    nvml = Nvml(((10, 80), 1))
    gpus = Gpus(lambda: nvml)
    assert len(gpus.read()) == 1

    def lost() -> int:
        raise nvml.NVMLError("Driver Not Loaded")

    nvml.nvmlDeviceGetCount = lost  # type: ignore[method-assign]
    assert gpus.read() == []


def test_more_gpus_than_labels_are_left_out():
    assert len(Gpus(lambda: Nvml(*[((1, 2), 3)] * 20)).read()) == len(DEVICES)


def test_rays_binding_has_what_is_asked_of_it():
    from ray._private.thirdparty import pynvml

    assert isinstance(Gpus(lambda: pynvml).read(), list)
    assert all(hasattr(pynvml, name) for name in vars(Nvml) if name.startswith(("nvml", "NVML")))
