"""BentoML's services, with its adaptive batching where there is a model."""

import bentoml
import numpy as np


@bentoml.service(workers=1, traffic={"timeout": 60, "max_concurrency": 512}, resources={"cpu": "1"})
class MiniLM:
    def __init__(self) -> None:
        from bare_model import MiniLM as Bare

        self._model = Bare()

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=60_000)
    def embed(self, texts: list[str]) -> np.ndarray:
        return self._model.embed(texts)


@bentoml.service(workers=1, traffic={"timeout": 60, "max_concurrency": 512}, resources={"cpu": "1"})
class Noop:
    @bentoml.api
    async def echo(self, x: list[float]) -> dict:
        return {"y": x}
