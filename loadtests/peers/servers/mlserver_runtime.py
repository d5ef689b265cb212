"""MLServer's custom runtimes; its adaptive batching joins the requests."""

from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse


class MiniLM(MLModel):
    async def load(self) -> bool:
        from bare_model import MiniLM as Bare

        self._model = Bare()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        vectors = self._model.embed(StringCodec.decode_input(payload.inputs[0]))
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("embedding", vectors)])


class Noop(MLModel):
    async def load(self) -> bool:
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = NumpyCodec.decode_input(payload.inputs[0])
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", rows)])
