"""Series to forecasts with Fracast, of any lengths in one batch: what a shorter one lacks counts as not observed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serve.errors import InvalidInput, LoadError
from serve.models.base import Item, LoadContext, Signature, TensorSpec
from serve.models.devices import use_threads
from serve.spec import ForecastOptions

#: Fewest steps that the model forecasts from.
_LEAST_STEPS = 8

#: Blocks that follow one another, each forecast from the medians of those before: what is further off is guesswork.
_MOST_BLOCKS = 10

#: Larger values could leave the range of float32 in the forecast.
_LARGEST = 1e30


@dataclass(frozen=True, slots=True)
class History:
    """What `prepare` makes of an item.

    Args:
        steps: The last steps of the series, float32 [steps].
        horizon: Steps to forecast.
    """

    steps: np.ndarray
    horizon: int


class Forecast:
    """A `Model`: `series` FP32 [-1, -1] -> `quantiles` FP32 [-1, steps, 9] and `median` FP32 [-1, steps]."""

    signature: Signature

    def load(self, context: LoadContext) -> None:
        """Load config.json and model.safetensors of `context.folder` (or of its folder `weights`).

        Raises:
            LoadError: The package fracast or a file is absent, a file is damaged, or `max_context` is too large.
        """
        options: ForecastOptions = context.options
        use_threads(context.threads)
        context.progress("weights", 0, 1)
        self._model = _load_model(_weights_folder(context.folder), device=context.device)
        if options.max_context > self._model.context_length:
            raise LoadError(
                f"options.max_context is {options.max_context}; the model reads {self._model.context_length} steps"
            )
        if 0.5 not in self._model.quantiles:
            raise LoadError(f"the model's quantiles are {self._model.quantiles}, without the median")
        self._max_context = options.max_context
        self._median = self._model.quantiles.index(0.5)
        self.signature = _signature(options, block=self._model.horizon, quantiles=self._model.quantiles)
        context.progress("weights", 1, 1)

    def prepare(self, item: Item) -> History:
        """Check the series and keep its last `max_context` steps.

        Raises:
            InvalidInput: The series is too short or holds what is no finite number, or the parameter `horizon` is no
                number of steps that the model forecasts.
        """
        steps = _checked_series(item["series"])[-self._max_context :]
        horizon = item.get("parameters", {}).get("horizon", self._model.horizon)
        return History(steps, _checked_horizon(horizon, most=_MOST_BLOCKS * self._model.horizon))

    def predict(self, batch: Sequence[History]) -> list[Mapping[str, Any]]:
        """Return `quantiles` (float32 [horizon, 9]) and `median` (float32 [horizon]) of each series."""
        blocks = [-(-history.horizon // self._model.horizon) for history in batch]
        rows: dict[int, Mapping[str, Any]] = {}
        for count in set(blocks):
            places = [place for place, needed in enumerate(blocks) if needed == count]
            together = _aligned([batch[place].steps for place in places])
            forecasts = self._model.forecast_batch(together, horizon=count * self._model.horizon)
            for place, forecast in zip(places, forecasts.astype(np.float32), strict=True):
                quantiles = forecast[: batch[place].horizon]
                rows[place] = {"quantiles": quantiles, "median": quantiles[:, self._median]}
        return [rows[place] for place in range(len(batch))]


def _checked_series(value: Any) -> np.ndarray:
    steps = np.asarray(value, dtype=np.float32)
    if steps.ndim != 1:
        raise InvalidInput(f"a series is one row of numbers; shape {steps.shape} was found", place="series")
    if len(steps) < _LEAST_STEPS:
        raise InvalidInput(f"the series has {len(steps)} steps; {_LEAST_STEPS} are the fewest", place="series")
    fitting = np.abs(steps) <= _LARGEST  # false for NaN, too
    if not fitting.all():
        place = int(fitting.argmin())
        message = f"{steps[place]} is not a number between -{_LARGEST:g} and {_LARGEST:g}"
        raise InvalidInput(message, place=f"series[{place}]")
    return steps


def _checked_horizon(value: Any, *, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise InvalidInput(f"{value!r} is not a whole number of steps from 1 to {most}", place="parameters.horizon")
    return value


def _aligned(series: Sequence[np.ndarray]) -> np.ndarray:
    """Put series side by side, [N, steps], so that they end together; NaN is what the model takes as not observed."""
    together = np.full((len(series), max(len(steps) for steps in series)), np.nan, np.float32)
    for row, steps in zip(together, series, strict=True):
        row[len(row) - len(steps) :] = steps
    return together


def _weights_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "weights"):
        if (candidate / "model.safetensors").is_file() and (candidate / "config.json").is_file():
            return candidate
    raise LoadError(f"{folder} holds no config.json and model.safetensors, nor does its folder weights")


def _load_model(folder: Path, *, device: str) -> Any:
    try:
        with _without_compiler():
            from fracast import FracastModel
    except ImportError as error:
        raise LoadError(f"forecast computes with the package fracast: pip install fracast ({error})") from error
    try:
        return FracastModel.from_pretrained(folder, weights="fp32", device=device)
    except Exception as error:  # the package passes on whatever a damaged file or configuration causes
        raise LoadError(f"{folder} does not load as Fracast: {type(error).__name__}: {error}") from error


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Import without torch's compiler, which takes longer than all the rest.

    The package asks for it only to mark a function that is not to be compiled, and nothing is compiled here.
    """
    import torch

    disable = torch.compiler.disable
    torch.compiler.disable = lambda *_, **__: lambda function: function
    try:
        yield
    finally:
        torch.compiler.disable = disable


def _signature(options: ForecastOptions, *, block: int, quantiles: Sequence[float]) -> Signature:
    levels = ", ".join(f"{quantile:g}" for quantile in quantiles)
    season = 10 + 3 * np.sin(np.arange(96, dtype=np.float32) * 2 * np.pi / 24)
    return Signature(
        inputs=(
            TensorSpec(
                "series",
                "FP32",
                (-1, -1),
                f"Equally spaced observations, the latest last: {_LEAST_STEPS} or more, of which the last "
                f"{options.max_context} are used.",
            ),
        ),
        outputs=(
            TensorSpec("quantiles", "FP32", (-1, -1, len(quantiles)), f"Of each step to come, its quantiles {levels}."),
            TensorSpec("median", "FP32", (-1, -1), "Of each step to come, its median: the forecast as one line."),
        ),
        parameters={"horizon": f"Steps to forecast, 1 to {_MOST_BLOCKS * block}; {block} where it is left out."},
        example={"series": season.round(2).astype(np.float32)},
    )
