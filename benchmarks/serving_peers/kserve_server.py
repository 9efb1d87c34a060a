"""KServe's model server with one model, its request logging off."""

import os

import numpy as np
import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class Bench(Model):
    def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            os.environ["BENCH_MODEL"], sess_options=options, providers=["CPUExecutionProvider"]
        )
        self.ready = True
        return True

    async def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        rows = np.asarray(payload.inputs[0].data, dtype=np.float64).reshape(payload.inputs[0].shape)
        outputs = self.session.run(["outputs"], {"rows": rows})[0]
        answer = InferOutput("outputs", list(outputs.shape), "FP64", outputs.ravel().tolist())
        return InferResponse(payload.id or "1", "bench", [answer])


model = Bench("bench")
model.load()
ModelServer(
    http_port=int(os.environ["BENCH_PORT"]),
    enable_grpc=False,
    access_log_format=None,
    enable_latency_logging=False,
).start([model])
