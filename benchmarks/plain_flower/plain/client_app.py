"""One epoch of DP-SGD by Opacus on the site's CSV file."""

import csv
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from plain.model import model

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    files = sorted(
        set(Path(str(context.run_config["data"])).glob("*.csv"))
        - {Path(str(context.run_config["data"])) / "public.csv"}
    )
    rows = list(csv.reader(files[int(str(context.node_config["partition-id"]))].open()))[1:]
    x = torch.tensor([[float(cell) for cell in row[:-1]] for row in rows])
    y = torch.tensor([float(row[-1] == "malignant") for row in rows])
    net = model()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    engine = PrivacyEngine()
    net, optimizer, loader = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(TensorDataset((x - x.mean(0)) / x.std(0), y), batch_size=len(rows)),
        noise_multiplier=4.0,
        max_grad_norm=1.0,
    )
    for batch, targets in loader:
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(batch).squeeze(1), targets).backward()
        optimizer.step()
    arrays = ArrayRecord(net._module.state_dict())
    metrics = MetricRecord({"num-examples": len(rows), "epsilon": engine.get_epsilon(1e-5)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
