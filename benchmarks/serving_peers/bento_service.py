"""BentoML's service for the benchmark's model."""

import os

import bentoml
import numpy as np
import onnxruntime


@bentoml.service(workers=1)
class Bench:
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            os.environ["BENCH_MODEL"], sess_options=options, providers=["CPUExecutionProvider"]
        )

    @bentoml.api
    async def infer(self, request: dict) -> dict:
        tensor = request["inputs"][0]
        rows = np.array(tensor["data"], dtype=np.float64).reshape(tensor["shape"])
        outputs = self.session.run(["outputs"], {"rows": rows})[0]
        return {
            "outputs": [{"name": "outputs", "shape": list(outputs.shape), "data": outputs.ravel().tolist()}]
        }
