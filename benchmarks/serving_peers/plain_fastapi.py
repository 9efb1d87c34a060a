"""Plain FastAPI: a pydantic body, ONNX Runtime, nothing else."""

import os
from typing import Any

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(
    os.environ["BENCH_MODEL"], sess_options=options, providers=["CPUExecutionProvider"]
)
app = FastAPI()


class Tensor(BaseModel):
    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class Ask(BaseModel):
    inputs: list[Tensor]
    parameters: dict[str, Any] = {}


@app.post("/v2/models/bench/infer")
async def infer(ask: Ask) -> dict[str, Any]:
    tensor = ask.inputs[0]
    rows = np.array(tensor.data, dtype=np.float64).reshape(tensor.shape)
    outputs = session.run(["outputs"], {"rows": rows})[0]
    answer = {"name": "outputs", "shape": list(outputs.shape), "datatype": "FP64"}
    return {"model_name": "bench", "outputs": [{**answer, "data": outputs.ravel().tolist()}]}


uvicorn.run(app, port=int(os.environ["BENCH_PORT"]), access_log=False, log_level="warning")
