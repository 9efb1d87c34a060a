"""What a round costs: over a real network beside plain Flower with Opacus, and in simulation beside Ray.

Parts, each under four minutes on two quiet cores; `--write` merges a part's figures into the page, from a
file of figures beside it, so that one page can come from several sittings on one machine:

    network   four real SuperNodes: ours with TLS, authentication, agents, ledgers, statements and
              witnessing; a plain Flower + Opacus app at defaults (benchmarks/plain_flower); and ours
              with secure aggregation
    pieces    a model of ten million parameters through real SuperNodes
    simulate  100 virtual sites: ours with statements and ledger, Flower's Ray simulation of the same step,
              Ray with a client that does nothing, a plain loop
    thousand  1,000 virtual sites with a small network of one hidden layer
    memory    most memory held at a round's end, of 10, 100 and 300 rounds, each in a process of its own
    large     rounds of a model of 10 million parameters, in one process
    huge      the same with 100 million: some 8 GiB

    python benchmarks/bench_federation.py [--part NAME ...] [--write]

CPU-seconds are of every process that the benchmark started, between two rounds' ends.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import federation_network
from federation_costs import OFFLINE, Laps, Phases, children_mib, peak_mib, resident_mib
from federation_page import ROWS, SITES, page

HERE: Final = Path(__file__).resolve().parent
PAGE: Final = HERE.parent / "docs" / "results" / "federation_speed.md"
FIGURES: Final = PAGE.with_suffix(".json")
PARTS: Final = ("network", "pieces", "simulate", "thousand", "memory", "large", "huge")
FEATURES, HIDDEN = 30, 32  # about a thousand parameters
CHARTER: Final = """
name: bench
task: binary
features: [{features}]
label: {{name: y, classes: ["no", "yes"]}}
model: {model}
plan: {{learning_rate: 1, rounds: {rounds}, average_last: 1, round_timeout_s: 900}}
privacy:
  {{unit: row, relation: add_remove, epsilon: 100, delta: 1e-5, max_grad_norm: 1, grid_bits: {grid_bits},
    noise_multiplier: 8, precision: {precision}}}
"""


def charter(
    rounds: int,
    *,
    model: str = "",
    features: int = FEATURES,
    precision: str = "float64",
    grid_bits: int = 20,
) -> str:
    names = ", ".join(f"{{name: f{i}, type: number, lower: -4, upper: 4}}" for i in range(features))
    model = model or f"{{family: mlp, hidden: [{HIDDEN}]}}"
    return CHARTER.format(
        features=names, model=model, rounds=rounds, precision=precision, grid_bits=grid_bits
    )


def frame(seed: int, *, rows: int = ROWS, features: int = FEATURES) -> Any:
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(seed)
    x = np.clip(rng.normal(size=(rows, features)), -4, 4)
    columns = {f"f{i}": x[:, i] for i in range(features)}
    return pd.DataFrame({**columns, "y": np.where(x[:, 0] + x[:, 1] > 0, "yes", "no")})


def simulate_ours(sites: int, rounds: int, **options: Any) -> dict[str, Any]:
    from clients.simulation import simulate

    laps, begun, forked = Laps(), time.time(), 0
    ready: list[float] = []
    resident: list[int] = []
    phases, own, since = Phases(), list[float](), 0.0

    def watch(event: Any) -> None:
        phases.mark(event.kind)
        if event.kind == "accepted":
            ready.append(time.time() - begun)
        if event.kind == "round":
            nonlocal since
            own.append(time.process_time() - since)
            laps.mark()
            resident.append(resident_mib())
            if event.round in (1, rounds - 1):
                nonlocal forked
                forked = max(forked, children_mib())
            phases.mark("counted")
            since = time.process_time()

    frames = {f"s{i:04d}": frame(i, features=options.get("features", FEATURES)) for i in range(sites)}
    text = charter(rounds, **options)
    run = simulate(text, frames, homes="memory", on_event=watch)
    parameters = run.charter.dimension
    run.close()
    wall, cpu = laps.medians()
    return {
        "wall": wall,
        "cpu": cpu,
        "coordinator_cpu": round(statistics.median(own[1:]), 3),
        **phases.medians(),
        "peak_mib": peak_mib() + forked,
        "rounds_mib": max(resident),
        "parameters": parameters,
        "setup": round(ready[0], 1),
    }


def part_simulate() -> dict[str, Any]:
    return {
        "ours": apart("simulate_ours", SITES, 12),
        "ray": apart("ray_simulation", True),
        "ray_idle": apart("ray_simulation", False),
        "loop": apart("plain_loop"),
    }


def plain_model() -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))


def opacus_step(net: Any, data: Any) -> None:
    import torch
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    x, y = data
    private, optimizer, loader = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=len(x)),
        noise_multiplier=4.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for batch, targets in loader:
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(private(batch).squeeze(1), targets).backward()
        optimizer.step()


def tensors(seed: int) -> Any:
    import torch

    data = frame(seed)
    x = torch.tensor(data.iloc[:, :-1].to_numpy(), dtype=torch.float32) / 4
    return x, torch.tensor([float(label == "yes") for label in data["y"]])


def ray_simulation(trains: bool, rounds: int = 5) -> dict[str, Any]:
    """Flower's own simulation of the same hundred sites, with Opacus's step or with none."""
    os.environ.update(OFFLINE)
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    client, server, laps = ClientApp(), ServerApp(), Laps()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"]
        if trains:
            import warnings

            warnings.filterwarnings("ignore")
            net = plain_model()
            net.load_state_dict(arrays.to_torch_state_dict())
            opacus_step(net, tensors(int(context.node_config["partition-id"])))
            arrays = ArrayRecord(net.state_dict())
        metrics = MetricRecord({"num-examples": ROWS})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=SITES, min_available_nodes=SITES)
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(plain_model().state_dict()),
            num_rounds=rounds,
            evaluate_fn=lambda number, arrays: laps.mark() if number else None,
        )

    backend = {
        "init_args": {"num_cpus": os.cpu_count(), "include_dashboard": False, "log_to_driver": False},
        "client_resources": {"num_cpus": 1},
    }
    run_simulation(server, client, SITES, backend_config=backend)
    wall, cpu = laps.medians()
    return {"wall": wall, "cpu": cpu}


def plain_loop(rounds: int = 4) -> dict[str, Any]:
    """The same steps in a loop: no messages, no sites, no record."""
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    net, data, laps = plain_model(), [tensors(i) for i in range(SITES)], Laps()
    for _ in range(rounds):
        total: dict[str, Any] = {}
        for rows in data:
            site = plain_model()
            site.load_state_dict(net.state_dict())
            opacus_step(site, rows)
            for name, value in site.state_dict().items():
                total[name] = total.get(name, 0) + value / SITES
        net.load_state_dict({name.removeprefix("_module."): value for name, value in total.items()})
        laps.mark()
    wall, cpu = laps.medians()
    return {"wall": wall, "cpu": cpu}


def part_thousand() -> dict[str, Any]:
    return {"ours": apart("simulate_ours", 1000, 4)}


def part_memory() -> dict[str, Any]:
    return {str(rounds): apart("simulate_long", rounds)["rounds_mib"] for rounds in (10, 100, 300)}


def simulate_long(rounds: int) -> dict[str, Any]:
    return simulate_ours(5, rounds, grid_bits=24)  # what rounding costs in delta adds up over the rounds


def large_model(width: int) -> str:
    first = f"{{layer: linear, in: 8, out: {width}, bias: true}}, {{layer: tanh}}"
    middle = f"{{layer: linear, in: {width}, out: {width}, bias: true}}, {{layer: tanh}}"
    return (
        f"{{family: layers, layers: [{first}, {middle}, {{layer: linear, in: {width}, out: 1, bias: true}}]}}"
    )


def simulate_large(width: int, precision: str) -> dict[str, Any]:
    return simulate_ours(2, 3, model=large_model(width), features=8, precision=precision)


def part_large() -> dict[str, Any]:
    return apart("simulate_large", 3160, "float64")


def part_huge() -> dict[str, Any]:
    return apart("simulate_large", 9995, "float32")


def part_network() -> dict[str, Any]:
    return {
        "ours": apart("network_ours", False),
        "plain": apart("network_plain"),
        "masked": apart("network_ours", True),
    }


def part_pieces() -> dict[str, Any]:
    return apart("network_pieces")


def apart(function: str, *arguments: Any) -> dict[str, Any]:
    """Call one function of this file in a fresh process; return what it found."""
    command = [sys.executable, __file__, "--call", function, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{function}{arguments} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{function}{arguments}: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--call", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.call:
        import logging

        logging.disable(logging.WARNING)
        functions = {**vars(federation_network), **globals()}
        print(json.dumps(functions[options.call[0]](*json.loads(options.call[1]))))
        return
    figures: dict[str, Any] = {}
    for name in options.part or PARTS:
        where = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "load": f"{os.getloadavg()[0]:.1f}",
        }
        begun, found = time.monotonic(), globals()[f"part_{name}"]()
        figures[name] = {**found, "where": where, "took_s": round(time.monotonic() - begun)}
        if options.write:  # beside what other sittings found meanwhile
            kept = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
            kept[name] = figures[name]
            FIGURES.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
            PAGE.write_text(page(kept))
    if not options.write:
        print(page(figures))


if __name__ == "__main__":
    main()
