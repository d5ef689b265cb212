"""The model that does nothing, for what a request costs without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve.models.base import Signature, TensorSpec


class Echo:
    """Answers four numbers with themselves."""

    signature = Signature(
        inputs=(TensorSpec("x", "FP32", (-1, 4), "Four numbers."),),
        outputs=(TensorSpec("y", "FP32", (-1, 4), "The same numbers."),),
    )

    def predict(self, batch: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return each row as it is."""
        return [{"y": item["x"]} for item in batch]
