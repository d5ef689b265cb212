"""KServe's SDK server, which leaves batches to a sidecar that a machine without Kubernetes has not.

Usage: kserve_server.py minilm|noop PORT
"""

import sys

import kserve
from fastapi.concurrency import run_in_threadpool


class MiniLM(kserve.Model):
    def load(self):
        from bare_model import MiniLM as Bare

        self._model, self.ready = Bare(), True

    async def predict(self, payload, headers=None, response_headers=None):
        vectors = await run_in_threadpool(self._model.embed, payload["instances"])
        return {"predictions": vectors.tolist()}


class Noop(kserve.Model):
    def load(self):
        self.ready = True

    async def predict(self, payload, headers=None, response_headers=None):
        return {"predictions": payload["instances"]}


if __name__ == "__main__":
    what, port = sys.argv[1:]
    model = (MiniLM if what == "minilm" else Noop)(what)
    model.load()
    server = kserve.ModelServer(
        http_port=int(port), enable_grpc=False, workers=1, enable_docs_url=False, access_log_format=None
    )
    server.start([model])
