"""Where a model runs and in which type, decided from its spec before anything heavy is imported."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from serve.errors import LoadError
from serve.spec import ModelSpec

_ANY = frozenset({"float32", "bfloat16", "float16"})
_FLOAT32 = frozenset({"float32"})

#: Task -> types that its computation supports on each device; a task that is not here takes any.
_DTYPES = {
    "text-embedding": {"cpu": _FLOAT32, "cuda": _ANY},
    "speech-to-text": {"cpu": _FLOAT32, "cuda": _ANY},
    "forecast": {"cpu": _FLOAT32, "cuda": _FLOAT32},
    "voice-activity": {"cpu": _FLOAT32, "cuda": _FLOAT32},
}

#: Task -> type that `auto` takes on a GPU, where that is not float32: language models are published in bfloat16, and
#: Whisper's converted weights are stored in float16, so neither loses anything. Elsewhere float32 keeps answers
#: equal to the published model's; a lower precision is for the declaration to choose.
_CUDA_DTYPE = {"text-generation": "bfloat16", "speech-to-text": "float16"}


def decide(spec: ModelSpec) -> tuple[str, str]:
    """Return the device (`cpu` or `cuda`) and the dtype (`float32`, `bfloat16` or `float16`) of a model.

    `auto` takes a GPU only where the spec reserves one and CUDA sees one. A spec that reserves none is decided without
    importing torch.

    Raises:
        LoadError: CUDA is asked for and absent, or the task does not compute in the type that is asked for.
    """
    device = _decide_device(spec)
    if spec.dtype == "auto":
        return device, _CUDA_DTYPE.get(spec.task, "float32") if device == "cuda" else "float32"
    supported = _DTYPES.get(spec.task, {}).get(device, _ANY)
    if spec.dtype not in supported:
        raise LoadError(
            f"dtype {spec.dtype} is not supported for {spec.task} on {device}; "
            f"leave dtype out, or set {' or '.join(sorted(supported))}"
        )
    return device, spec.dtype


def use_threads(threads: int) -> None:
    """Have torch compute with `threads` threads in this process."""
    import torch

    torch.set_num_threads(threads)


def use_numpy_threads(threads: int) -> None:
    """Have numpy's matrix products compute with `threads` threads in this process.

    Its OpenBLAS takes every core otherwise, and a replica that shares its cores would then wait for its own threads.
    A numpy built upon another library (Accelerate on macOS) is left as it is.
    """
    from numpy.linalg import _umath_linalg

    library = ctypes.CDLL(_umath_linalg.__file__)
    for prefix, suffix in (("scipy_", "64_"), ("", "64_"), ("", "")):
        name = f"{prefix}openblas_set_num_threads{suffix}"
        if hasattr(library, name):
            getattr(library, name)(ctypes.c_int(threads))
            return


def _decide_device(spec: ModelSpec) -> str:
    if spec.device == "cpu" or not spec.resources.gpus:
        return "cpu"
    reason = _CUDA_PROBES.get(spec.task, _torch_lacks_cuda)()
    if reason is None:
        return "cuda"
    if spec.device == "cuda":
        raise LoadError(f"device is cuda and {reason}; or set device: auto to run on the CPU where there is no GPU")
    return "cpu"


def _torch_lacks_cuda() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install its CUDA build"
    return _driver_lacks_gpu() or (
        f"torch {torch.__version__} cannot use the GPU: install a driver that supports CUDA {torch.version.cuda}"
    )


def _ctranslate2_lacks_cuda() -> str | None:
    import ctranslate2

    try:
        found = int(ctranslate2.get_cuda_device_count())
    except RuntimeError as error:
        return f"ctranslate2 cannot use the GPU ({error}): install a driver that supports its CUDA"
    return None if found else _NO_GPU


def _driver_lacks_gpu() -> str | None:
    """Ask the driver itself; a user's class may compute with any library."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return _NO_GPU
    count = ctypes.c_int(0)
    usable = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return None if usable and count.value else _NO_GPU


_NO_GPU = (
    "no NVIDIA GPU is visible: check that nvidia-smi lists one here and that CUDA_VISIBLE_DEVICES does not hide it, "
    "or schedule the replica on a node that has one"
)

#: Task -> what asks its library; the others compute with torch.
_CUDA_PROBES: dict[str, Callable[[], str | None]] = {
    "speech-to-text": _ctranslate2_lacks_cuda,
    "python": _driver_lacks_gpu,
    "voice-activity": lambda: "voice-activity computes on the CPU alone: leave device and resources.gpus out",
}
