"""Where a model runs and in which type, decided from its spec and the machine."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import pytest
from numpy.linalg import _umath_linalg

from serve.errors import LoadError
from serve.models import devices
from serve.models.devices import decide, use_numpy_threads, use_threads
from serve.spec import ModelSpec


def spec(task: str, **values: Any) -> ModelSpec:
    options = {"class": "Doubler"} if task == "python" else {}
    return ModelSpec.model_validate({"name": "m", "task": task, "source": "file:.", "options": options} | values)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_CUDA_PROBES", {})
    monkeypatch.setattr(devices, "_torch_lacks_cuda", lambda: None)


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("ctranslate2.get_cuda_device_count", lambda: 0)
    monkeypatch.setattr("ctypes.CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))


@pytest.mark.parametrize("task", ["text-embedding", "text-generation", "image-classification", "speech-to-text"])
def test_without_a_gpu_reserved_it_is_the_cpu_in_float32(task: str) -> None:
    assert decide(spec(task)) == ("cpu", "float32")


def test_the_cpu_is_decided_without_importing_torch() -> None:
    code = (
        "import sys; from serve.models.devices import decide; from serve.spec import ModelSpec;"
        "assert decide(ModelSpec(name='m', task='forecast', source='file:.')) == ('cpu', 'float32');"
        "assert not {'torch', 'ctranslate2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("task", "dtype"),
    [
        ("text-generation", "bfloat16"),
        ("speech-to-text", "float16"),
        ("text-embedding", "float32"),
        ("image-classification", "float32"),
        ("forecast", "float32"),
    ],
)
def test_auto_takes_the_gpu_that_is_reserved(cuda: None, task: str, dtype: str) -> None:
    assert decide(spec(task, resources={"gpus": 0.25})) == ("cuda", dtype)


def test_a_cpu_asked_for_stays_a_cpu(cuda: None) -> None:
    assert decide(spec("text-embedding", device="cpu")) == ("cpu", "float32")


@pytest.mark.parametrize("task", ["text-embedding", "speech-to-text", "python"])
def test_auto_falls_back_to_the_cpu_where_there_is_no_cuda(no_cuda: None, task: str) -> None:
    assert decide(spec(task, resources={"gpus": 1.0}))[0] == "cpu"


@pytest.mark.parametrize("task", ["text-embedding", "speech-to-text", "python"])
def test_cuda_asked_for_and_absent_is_an_error_with_a_fix(no_cuda: None, task: str) -> None:
    with pytest.raises(LoadError, match=r"device is cuda and (?s:.*)(nvidia-smi|CUDA build)"):
        decide(spec(task, device="cuda", resources={"gpus": 1.0}))


def test_a_task_of_the_cpu_alone_says_so() -> None:
    assert decide(spec("voice-activity", resources={"gpus": 0.5})) == ("cpu", "float32")
    with pytest.raises(LoadError, match="voice-activity computes on the CPU alone"):
        decide(spec("voice-activity", device="cuda", resources={"gpus": 0.5}))


def test_a_torch_without_cuda_is_named(no_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(LoadError, match="is built without CUDA: install its CUDA build"):
        decide(spec("text-embedding", device="cuda", resources={"gpus": 1.0}))


def test_a_dtype_asked_for_is_kept(cuda: None) -> None:
    assert decide(spec("image-classification", dtype="bfloat16")) == ("cpu", "bfloat16")
    assert decide(spec("text-generation", dtype="float16", resources={"gpus": 1.0})) == ("cuda", "float16")


@pytest.mark.parametrize("task", ["forecast", "voice-activity", "speech-to-text", "text-embedding"])
def test_a_dtype_that_the_task_cannot_compute_in_is_refused(task: str) -> None:
    with pytest.raises(LoadError, match=f"dtype float16 is not supported for {task} on cpu; .* set float32"):
        decide(spec(task, dtype="float16"))


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_computes_with_the_threads_given(threads: int) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        use_threads(threads)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_numpy_computes_with_the_threads_given(threads: int) -> None:
    library = ctypes.CDLL(_umath_linalg.__file__)
    names = ("scipy_openblas_get_num_threads64_", "openblas_get_num_threads64_", "openblas_get_num_threads")
    count = next((getattr(library, name) for name in names if hasattr(library, name)), None)
    if count is None:
        pytest.skip("this numpy is not built upon OpenBLAS")
    before = count()
    try:
        use_numpy_threads(threads)
        assert count() == threads
    finally:
        use_numpy_threads(before)


@pytest.mark.gpu
def test_a_real_gpu_is_taken() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert decide(spec("text-embedding", device="cuda", resources={"gpus": 1.0})) == ("cuda", "float32")
