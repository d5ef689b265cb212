"""The binding that Ray brings is had without Ray, which would cost each pod a hundred megabytes."""

from __future__ import annotations

import subprocess
import sys

from serve.runtime import nvml
from serve.telemetry.devices import Gpus


def test_the_binding_is_had_without_ray():
    program = (
        "import sys; from serve.runtime.nvml import binding\n"
        "print(binding().__name__, 'ray' in sys.modules, hasattr(binding(), 'nvmlInit'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["roundhouse_pynvml", "False", "True"]


def test_gpus_are_read_by_it_where_there_are_any():
    assert all(device.size_bytes >= device.used_bytes >= 0 for device in Gpus(nvml.binding).read())
