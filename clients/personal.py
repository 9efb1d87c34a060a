"""What a site gains by taking part: the federation's model against its own, on held-out rows of its own.

For a simulation, where one person holds everybody's rows. Nothing here is released or logged; a real site
evaluates at home in the same way, or takes part in a private evaluation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from audit.metrics import METRICS_OF_TASK, baseline, evaluate
from audit.models import initial_weights
from audit.replay import AggregationPlan, Aggregator, SiteUpdate, average
from audit.robust import MEAN
from clients.comparison import UnprotectedSite
from clients.errors import SimulationError
from clients.loader import load_all_data
from clients.local_layers import LocalLayers, overlaid
from clients.terms import read_terms
from federation.charter import Charter
from federation.torch_models import build_model, set_weights

if TYPE_CHECKING:
    from clients.simulated import SiteData


def train_alone(charter: Charter, site: str, path: Path) -> list[float]:
    """Return the weights of the charter's recipe on one site's rows, without noise; they stay there."""
    terms = read_terms(charter.canonical().decode(), site=site)
    alone = UnprotectedSite(terms, path)
    plan = replace(AggregationPlan.of_charter(charter.document), rule=MEAN)
    aggregator = Aggregator(plan)
    weights = initial_weights(list(charter.layers), charter.digest)
    after: list[list[float]] = []
    for number in range(1, charter.plan.rounds + 1):
        update = SiteUpdate(
            site=site, nominal_rows=terms.nominal_rows, weight=1.0, values=alone.update(weights)
        )
        weights = aggregator.step(number, weights, [update])
        after.append(weights if alone.local is None else overlaid(terms.spans, weights, alone.local))
    return average(after[-charter.average_last :])


def by_site(
    charter: Charter,
    weights: Sequence[float],
    files: Mapping[str, Path],
    held_out: Mapping[str, SiteData],
    kept: Mapping[str, Sequence[float] | None],
    metric: str | None = None,
) -> pd.DataFrame:
    """Return one row a site: what no model, its own model, the federation's and its personal one reach.

    Args:
        weights: the version's.
        files: each site's training rows. held_out: other rows of the same site, by site.
        kept: parameters of the layers that stayed at each site; None where none did.
        metric: accuracy, auc, r2 or mae; by default accuracy, or mae for a regression.

    Raises:
        SimulationError: a site is unknown, or the metric does not fit the task.
    """
    allowed = METRICS_OF_TASK[charter.task]
    chosen = metric or ("mae" if charter.task == "regression" else "accuracy")
    unknown = sorted(set(held_out) - set(charter.site_names))
    if unknown or chosen not in allowed:
        raise SimulationError(
            f"sites {unknown} are not the charter's"
            if unknown
            else f"{chosen} is no metric of a {charter.task} task; use {allowed}"
        )
    canonical, rows = charter.canonical().decode(), []
    for site in sorted(held_out):
        terms = read_terms(canonical, site=site)
        with tempfile.TemporaryDirectory() as folder:
            data, _ = load_all_data(_file(Path(folder), held_out[site]), terms)
        labels = _labels(charter, data.targets.tolist())
        local = kept.get(site)
        models = {
            "local_only": (train_alone(charter, site, files[site]), terms.site_index),
            "federated": (list(weights), None),
            "personal": (
                list(weights) if local is None else overlaid(terms.spans, weights, local),
                terms.site_index,
            ),
        }
        scores = {
            name: evaluate(
                chosen, charter.task, charter.document["label"], labels, _outputs(charter, flat, index, data)
            )
            for name, (flat, index) in models.items()
        }
        gain = scores["personal"] - scores["local_only"]
        rows.append(
            {
                "site": site,
                "rows": len(labels),
                "metric": chosen,
                "trivial": baseline(chosen, labels),
                **scores,
                "gain": -gain if chosen == "mae" else gain,
            }
        )
    return pd.DataFrame(rows).set_index("site")


def kept_layers(charter: Charter, folders: Mapping[str, Path], run: str) -> dict[str, list[float] | None]:
    """Return the layers that each site kept, averaged over the same rounds as the version."""
    return {
        site: LocalLayers(folder).average(run, charter.most_rounds, charter.average_last)
        for site, folder in folders.items()
    }


def _outputs(charter: Charter, flat: Sequence[float], site: int | None, data: Any) -> list[list[float]]:
    model = build_model([dict(layer) for layer in charter.layers], site=site)
    set_weights(model, flat)
    model.eval()
    with torch.inference_mode():
        outputs: list[list[float]] = model(torch.from_numpy(data.inputs)).tolist()
    return outputs


def _labels(charter: Charter, targets: list[float]) -> list[float]:
    """Undo the scaling of a regression's labels to [-1, 1]."""
    if charter.task != "regression":
        return targets
    lower, upper = float(charter.label.lower or 0), float(charter.label.upper or 0)
    return [lower + (value + 1) / 2 * (upper - lower) for value in targets]


def _file(folder: Path, data: SiteData) -> Path:
    from clients.simulated import write_frame

    return write_frame(folder / "held_out.csv", data)
