"""Forecasts follow the series, alone and beside others, and equal the bare model's."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fracast import FracastModel

from serve.errors import InvalidInput, LoadError
from serve.models.base import LoadContext, Model
from serve.models.forecast import Forecast
from serve.spec import ForecastOptions


def packaged() -> Path:
    spec = find_spec("fracast")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def context(folder: Path, **options: Any) -> LoadContext:
    return LoadContext(
        folder=folder,
        options=ForecastOptions(**options),
        device="cpu",
        dtype="float32",
        threads=1,
        max_batch_size=8,
        cache_dir=Path("/nonexistent"),
        progress=lambda what, done, total: None,
    )


@pytest.fixture(scope="module")
def model() -> Forecast:
    model = Forecast()
    model.load(context(packaged()))
    return model


@pytest.fixture(scope="module")
def bare() -> FracastModel:
    return FracastModel.from_pretrained(weights="fp32")


def wave(steps: int, start: int = 0, period: float = 24.0) -> np.ndarray:
    return (10 + 3 * np.sin(np.arange(start, start + steps) * 2 * np.pi / period)).astype(np.float32)


def answer(model: Forecast, series: Any, **parameters: Any) -> Any:
    item = {"series": series} | ({"parameters": parameters} if parameters else {})
    (row,) = model.predict([model.prepare(item)])
    return row


def test_it_is_a_model(model: Forecast) -> None:
    assert isinstance(model, Model)


@pytest.mark.parametrize("period", [12.0, 24.0, 48.0])
def test_the_forecast_of_a_sine_wave_follows_it(model: Forecast, period: float) -> None:
    found = answer(model, wave(480, period=period))
    truth = wave(48, start=480, period=period)
    assert np.corrcoef(found["median"], truth)[0, 1] > 0.99
    assert np.abs(found["median"] - truth).max() < 0.9
    assert found["quantiles"][:, 0].mean() < found["median"].mean() < found["quantiles"][:, -1].mean()


def test_forecasts_equal_those_of_the_bare_model(model: Forecast, bare: FracastModel) -> None:
    generator = np.random.default_rng(0)
    series = [
        wave(480),
        wave(100) + generator.normal(0, 0.5, 100).astype(np.float32),
        generator.normal(0, 1, 2048).astype(np.float32).cumsum(),
        np.full(8, 5.0, np.float32),
        -1e6 * wave(60, period=7),
    ]
    answers = model.predict([model.prepare({"series": steps}) for steps in series])
    for steps, found in zip(series, answers, strict=True):
        assert found["quantiles"].shape == (48, 9)
        assert found["quantiles"].dtype == found["median"].dtype == np.float32
        expected = bare.forecast(steps)
        np.testing.assert_allclose(found["quantiles"], expected, atol=1e-5 * np.abs(expected).max())
        assert np.array_equal(found["median"], found["quantiles"][:, 4])


def test_a_batch_of_several_horizons_answers_each_in_order(model: Forecast, bare: FracastModel) -> None:
    horizons = [48, 1, 100, 96, 7]
    batch = [
        model.prepare({"series": wave(200 + n), "parameters": {"horizon": horizon}})
        for n, horizon in enumerate(horizons)
    ]
    for n, (horizon, found) in enumerate(zip(horizons, model.predict(batch), strict=True)):
        assert found["median"].shape == (horizon,)
        np.testing.assert_allclose(found["quantiles"], bare.forecast(wave(200 + n), horizon=horizon), atol=1e-4)


def test_only_the_last_steps_are_used(bare: FracastModel) -> None:
    model = Forecast()
    model.load(context(packaged(), max_context=96))
    found = answer(model, np.concatenate([np.full(500, 1e6, np.float32), wave(96)]))
    np.testing.assert_allclose(found["quantiles"], bare.forecast(wave(96)), atol=1e-4)


def test_the_signature_describes_the_answer_and_its_example_is_answered(model: Forecast) -> None:
    assert [(t.name, t.datatype, t.shape) for t in model.signature.inputs] == [("series", "FP32", (-1, -1))]
    assert [(t.name, t.datatype, t.shape) for t in model.signature.outputs] == [
        ("quantiles", "FP32", (-1, -1, 9)),
        ("median", "FP32", (-1, -1)),
    ]
    assert list(model.signature.parameters) == ["horizon"]
    assert model.signature.example is not None
    found = answer(model, model.signature.example["series"])
    assert np.abs(found["median"] - wave(48, start=96)).max() < 1.5


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e30])
def test_what_is_no_usable_number_is_refused_with_its_place(model: Forecast, value: float) -> None:
    series = wave(40)
    series[[17, 30]] = value
    with pytest.raises(InvalidInput, match="is not a number between") as caught:
        model.prepare({"series": series})
    assert caught.value.place == "series[17]"


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_short_series_is_refused(model: Forecast, steps: int) -> None:
    with pytest.raises(InvalidInput, match=f"series: the series has {steps} steps; 8 are the fewest"):
        model.prepare({"series": wave(steps)})


def test_a_series_of_another_rank_is_refused(model: Forecast) -> None:
    with pytest.raises(InvalidInput, match=r"series: a series is one row of numbers; shape \(2, 20\) was found"):
        model.prepare({"series": wave(40).reshape(2, 20)})


@pytest.mark.parametrize("horizon", [0, -1, 481, 2.5, "12", True, None, [3]])
def test_a_horizon_that_is_no_number_of_steps_is_refused(model: Forecast, horizon: Any) -> None:
    with pytest.raises(InvalidInput, match="is not a whole number of steps from 1 to 480") as caught:
        model.prepare({"series": wave(40), "parameters": {"horizon": horizon}})
    assert caught.value.place == "parameters.horizon"


@pytest.mark.parametrize("series", [np.full(40, 3.0), np.array([1e30, -1e30] * 20), np.array([1e-30, 0.0] * 20)])
def test_extreme_series_give_finite_forecasts(model: Forecast, series: np.ndarray) -> None:
    found = answer(model, series.astype(np.float32))
    assert np.isfinite(found["quantiles"]).all()


def test_torchs_compiler_is_not_imported() -> None:
    code = (
        "import sys, torch; from pathlib import Path; from serve.models.forecast import Forecast;"
        "from serve.models.base import LoadContext; from serve.spec import ForecastOptions; m = Forecast();"
        "disable = torch.compiler.disable;"
        "m.load(LoadContext(Path(sys.argv[1]), ForecastOptions(), 'cpu', 'float32', 1, 8, Path('/nonexistent'),"
        "lambda what, done, total: None)); m.predict([m.prepare(m.signature.example)]);"
        "assert 'torch._dynamo' not in sys.modules; assert torch.compiler.disable is disable"
    )
    subprocess.run([sys.executable, "-c", code, str(packaged())], check=True)


def test_more_context_than_the_model_reads_does_not_load() -> None:
    with pytest.raises(LoadError, match=r"options\.max_context is 4096; the model reads 2048 steps"):
        Forecast().load(context(packaged(), max_context=4096))


def test_a_source_without_weights_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"holds no config\.json and model\.safetensors"):
        Forecast().load(context(tmp_path))


def test_damaged_files_do_not_load(tmp_path: Path) -> None:
    shutil.copytree(packaged() / "weights", tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(LoadError, match="does not load as Fracast: KeyError"):
        Forecast().load(context(tmp_path))
    shutil.copy(packaged() / "weights" / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(LoadError, match="does not load as Fracast"):
        Forecast().load(context(tmp_path))


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = packaged()
    monkeypatch.setitem(sys.modules, "fracast", None)
    with pytest.raises(LoadError, match="pip install fracast"):
        Forecast().load(context(folder))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same_forecast(bare: FracastModel) -> None:
    model = Forecast()
    model.load(dataclasses.replace(context(packaged()), device="cuda"))
    np.testing.assert_allclose(answer(model, wave(480))["quantiles"], bare.forecast(wave(480)), atol=0.02)
