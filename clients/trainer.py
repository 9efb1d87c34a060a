"""From a base model to one noised update: the site's data, model and mechanism, warm between rounds."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from audit.errors import AuditError
from audit.reference import Reference
from clients.dp.mechanism import Mechanism, MechanismTerms
from clients.dp.site_update import LocalTraining, SiteMechanism
from clients.errors import DataFileError, RefusedError
from clients.evaluation import noisy_counts
from clients.loader import TrainingData, load_evaluation_data, load_training_data
from clients.local_layers import LocalLayers, moved_locally, overlaid, shared_values
from clients.sketching import noisy_sketch
from clients.terms import Terms
from federation.flat import Integers, Vector, model_vector
from federation.torch_models import build_model

Rows = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, as the mechanism takes them


class Workshop(threading.local):
    """What rounds are computed with, kept warm: the charter's mechanism and the last base model, a thread.

    It holds nothing of any site's rows: virtual sites of one process share it. A mechanism draws from a fresh
    key of the operating system in every release.
    """

    def __init__(self) -> None:
        self._mechanisms: dict[tuple[str, int | None], Mechanism] = {}
        self._base: tuple[str, bytes, Vector] | None = None
        self._loaded: tuple[Mechanism, Vector] | None = None
        self._last: list[Rows] = []  # of those who released from the base model before the loaded one
        self._now: list[Rows] = []  # and from the loaded one

    def mechanism(self, terms: Terms) -> Mechanism:
        """Return the charter's mechanism, made at the first call."""
        own = any(layer["layer"] == "site_intercept" for layer in terms.layers)
        key = (terms.digest, terms.site_index if own else None)
        if key not in self._mechanisms:
            model = build_model(
                [dict(layer) for layer in terms.layers], precision=terms.precision, site=terms.site_index
            )
            self._mechanisms[key] = (
                SiteMechanism(model, mechanism_terms(terms), terms.loss, local_training(terms))
                if terms.by_site
                else Mechanism(model, mechanism_terms(terms), terms.loss)
            )
        return self._mechanisms[key]

    def base(self, terms: Terms, base_model: bytes) -> Vector:
        """Return the flat weights of a model file; a caller leaves them as they are.

        Raises:
            AuditError: it is no model file, or of another model.
        """
        if self._base is None or self._base[0] != terms.digest or self._base[1] != base_model:
            self._base = (terms.digest, base_model, model_vector(terms.layers, base_model))
        return self._base[2]

    def load(self, mechanism: Mechanism, weights: Vector) -> None:
        """Set the mechanism's base model to what `base` returned; a release leaves it as it was."""
        if self._loaded is None or self._loaded[0] is not mechanism or self._loaded[1] is not weights:
            is_known = self._loaded is not None and self._loaded[0] is mechanism
            self._last, self._now = (self._now if is_known else []), []
            self._loaded = None
            mechanism.load(torch.tensor(weights, dtype=torch.float64))
            self._loaded = (mechanism, weights)

    def join(self, mechanism: Mechanism, rows: Rows) -> None:
        """Say that these rows are released next from what `load` set.

        The first to say so has the sums made in one pass for all that released from the base model before:
        they are asked next. Each site's is made of its own rows, and taken by its own release alone.
        """
        if not self._now and len(self._last) > 1:
            mechanism.prepare(self._last)
        self._now.append(rows)

    def rest(self) -> bool:
        """Draw noise for one of the next round's releases, while nobody asks; say whether more is wanted."""
        return self._loaded is not None and self._loaded[0].draw_ahead(len(self._now))

    def load_other(self, mechanism: Mechanism, weights: Sequence[float]) -> None:
        """Set it to other weights, which nobody else starts from."""
        self._loaded, self._last, self._now = None, [], []
        mechanism.load(torch.tensor(weights, dtype=torch.float64))


class Trainer:
    """One site's data file and the mechanisms of the charters it serves."""

    def __init__(self, path: Path, local_layers: LocalLayers, workshop: Workshop | None = None) -> None:
        self._path, self._local = path, local_layers
        self._workshop = workshop or Workshop()
        self._data: tuple[tuple[str, int, int], TrainingData] | None = None
        self._rows: tuple[TrainingData, Rows] | None = None

    def check_file(self, terms: Terms) -> None:
        """Read the file as a round would.

        Raises:
            DataFileError: the file as a whole cannot serve; never because of a row.
        """
        self._load(terms)

    def update(
        self, terms: Terms, base_model: bytes, *, run: str, server_round: int
    ) -> Sequence[int] | Integers:
        """Return the whole numbers of one noised release from `base_model`.

        Layers that the charter leaves at the site are taken from and kept in the site's own folder. They are
        moved by the same noised sums as the rest: were they fitted to the rows without noise, the other
        layers' gradients would tell of every row more than the clipping norm bounds.

        Raises:
            RefusedError: the base model is not of the charter, or the data file has gone.
        """
        try:
            weights = self._workshop.base(terms, base_model)
        except AuditError as error:
            raise RefusedError("base_model_mismatch", str(error)) from error
        last = terms.most_rounds
        after = terms.after[server_round - last - 1] if server_round > last else None
        counted = after is not None and not isinstance(after, Reference)
        try:
            data = load_evaluation_data(self._path, terms) if counted else self._load(terms)
        except DataFileError as error:
            raise RefusedError("contract_not_met", str(error)) from error
        if isinstance(after, Reference):
            return noisy_sketch(after, terms, data)
        if after is not None:
            return noisy_counts(after, terms, weights.tolist(), data)
        mechanism = self._workshop.mechanism(terms)
        kept = self._local.load_before(run, server_round) if terms.spans else None
        start: Sequence[float] | Vector = weights
        if kept is not None:
            start = overlaid(terms.spans, weights.tolist(), kept)
            self._workshop.load_other(mechanism, start)
        else:
            self._workshop.load(mechanism, weights)
        rows = self._rows_of(data, terms)
        if kept is None:
            self._workshop.join(mechanism, rows)
        release = mechanism.release(*rows)
        event = terms.event
        made = (release.sigma_grid, release.sensitivity_grid, release.dimension, release.steps)
        share = event.share_grid or event.sigma_grid
        if (*made, release.share_grid, release.site_sensitivity_grid) != (
            event.sigma_grid,
            event.sensitivity_grid,
            event.dimension,
            event.steps,
            share,
            event.site_sensitivity_grid,
        ):
            raise RefusedError("internal_error", f"the mechanism ran {made}, the charter asks for {event}")
        if not terms.spans:
            return release.update
        values: list[int] = release.update.tolist()
        moved = moved_locally(terms, mechanism.terms.scale, list(start), values)
        self._local.save(run, server_round, moved, keep=terms.average_last)
        return shared_values(terms.spans, values)

    def rest(self) -> bool:
        """See `Workshop.rest`."""
        return self._workshop.rest()

    def forget_round(self, run: str, server_round: int) -> None:
        """Take a round that was abandoned out of what this site keeps for itself."""
        self._local.drop(run, server_round)

    def _rows_of(self, data: TrainingData, terms: Terms) -> Rows:
        """Return the same two tensors for the same data."""
        if self._rows is None or self._rows[0] is not data:
            self._rows = (data, (torch.from_numpy(data.inputs), targets_of(data, terms)))
        return self._rows[1]

    def _load(self, terms: Terms) -> TrainingData:
        try:
            found = self._path.stat()
        except OSError:
            return load_training_data(self._path, terms)
        key = (terms.digest, found.st_mtime_ns, found.st_size)
        if self._data is None or self._data[0] != key:
            self._data = (key, load_training_data(self._path, terms))
        return self._data[1]


def mechanism_terms(terms: Terms) -> MechanismTerms:
    """Return the mechanism's constants; each follows from the charter, none from the data."""
    local = terms.local_steps > 1 and not terms.by_site  # a site's own steps get noise once, together
    return MechanismTerms(
        max_grad_norm=terms.max_grad_norm,
        noise_multiplier=terms.noise_multiplier,
        sample_rate=float(terms.sample_rate),
        relation=terms.relation,
        grid_bits=terms.event.grid_bits,
        precision=terms.precision,
        rows_per_unit=terms.max_rows_per_subject,
        local_steps=terms.event.steps,
        local_learning_rate=terms.local_learning_rate if local else None,
        proximal=terms.proximal if local else 0,
        normaliser=terms.normaliser if local else None,
        sharers=0 if terms.secure is None else terms.secure.sharers,
        summed_sites=1 if terms.secure is None else terms.secure.sites,
        max_update_norm=terms.max_update_norm,
    )


def local_training(terms: Terms) -> LocalTraining:
    """Return how a site trains before its whole update is bounded, where the site is the unit."""
    return LocalTraining(
        steps=terms.local_steps, learning_rate=terms.local_learning_rate, proximal=terms.proximal
    )


def targets_of(data: TrainingData, terms: Terms) -> torch.Tensor:
    """Return the labels as the charter's loss takes them."""
    targets = torch.from_numpy(data.targets)
    return targets.long() if terms.task == "multiclass" else targets
