"""LitServe with its own batching.

Usage: litserve_server.py minilm|noop PORT
"""

import sys

import litserve


class MiniLM(litserve.LitAPI):
    def setup(self, device):
        from bare_model import MiniLM as Bare

        self._model = Bare()

    def decode_request(self, request):
        return request["text"]

    def batch(self, inputs):
        return list(inputs)

    def predict(self, texts):
        return self._model.embed(texts)

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"embedding": output.tolist()}


class Noop(litserve.LitAPI):
    def setup(self, device):
        pass

    def decode_request(self, request):
        return request["x"]

    def predict(self, row):
        return row

    def encode_response(self, output):
        return {"y": output}


if __name__ == "__main__":
    what, port = sys.argv[1:]
    api = MiniLM(max_batch_size=32, batch_timeout=0.005) if what == "minilm" else Noop()
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(port), log_level="warning", access_log=False, generate_client_file=False)
