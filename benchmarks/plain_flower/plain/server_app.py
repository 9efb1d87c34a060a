"""FedAvg as the documentation has it; notes when each round was over."""

from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from plain.model import model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    times = Path(str(context.run_config["times"]))

    def note(server_round: int, arrays: ArrayRecord) -> None:
        with times.open("a") as file:
            file.write(f"{server_round}\n")

    strategy = FedAvg(min_train_nodes=4, min_available_nodes=4, fraction_evaluate=0.0)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model().state_dict()),
        num_rounds=int(str(context.run_config["rounds"])),
        evaluate_fn=note,
    )
