"""Ray Serve as its documentation teaches it: a deployment with `@serve.batch`, called by its proxy.

Usage: rayserve_server.py minilm|noop PORT
"""

import signal
import sys

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from starlette.requests import Request

QUIET = {"enable_access_log": False, "log_level": "WARNING"}


@serve.deployment(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=128, logging_config=QUIET)
class MiniLM:
    def __init__(self):
        from bare_model import MiniLM as Bare

        self._model = Bare()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def embed(self, texts):
        return [{"embedding": vector.tolist()} for vector in self._model.embed(texts)]

    async def __call__(self, request: Request):
        return await self.embed((await request.json())["text"])


@serve.deployment(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=128, logging_config=QUIET)
class Noop:
    async def __call__(self, request: Request):
        return {"y": (await request.json())["x"]}


if __name__ == "__main__":
    what, port = sys.argv[1:]
    stop = lambda *_: sys.exit(0)  # noqa: E731
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=int(port)), logging_config=QUIET)
    serve.run((MiniLM if what == "minilm" else Noop).bind(), name=what, route_prefix="/" + what, logging_config=QUIET)
    try:
        signal.pause()
    finally:
        ray.shutdown()
