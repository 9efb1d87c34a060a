"""Flower's own strategies, made provable: every reply is checked, and aggregation has one order and one
result.

Each class is a subclass of Flower's FedAvg, FedAdam or FedYogi. `configure_train` addresses exactly the
participants, `aggregate_train` proves every statement before its integers count, then aggregates in float64
exactly as `audit.replay` defines it, bit for bit; vectorised with numpy, which does the same operations in
the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdam, FedAvg, FedYogi

from audit.layers import parameter_specs
from audit.replay import AggregationPlan, ReplayError
from audit.secure_round import SecureRoundError
from audit.update_bounds import UpdateTerms, is_too_long, longest_sum, square_norm
from federation.blobs import BlobStore
from federation.charter import Charter
from federation.errors import StatementError
from federation.exchange import read_answer
from federation.flat import update_vector
from federation.robust_rules import combine, spread
from federation.statements import AcceptedUpdate, RoundTerms, verify_statement

Vector: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


class ProvableAggregation:
    """What the three strategies share. Call `open_round`, then Flower's `configure_train` and
    `aggregate_train`.
    """

    plan: AggregationPlan
    strategy_name: ClassVar[str]

    def prepare(self, charter: Charter, weights: Sequence[float] | Vector) -> None:
        """Take the charter's constants and the flat weights that the first round starts from."""
        self.charter = charter
        document = charter.document
        self.plan = AggregationPlan.of_charter(document)
        self.weights: Vector = np.array(weights, dtype=np.float64)
        self.accepted: dict[str, AcceptedUpdate] = {}
        self.rejected: dict[str, StatementError] = {}
        self.too_long: dict[str, AcceptedUpdate] = {}
        self.update_terms = {
            name: UpdateTerms.of_charter(
                document, name, dimension=charter.dimension, released=charter.released
            )
            for name in charter.site_names
        }
        self._sites = {site["name"]: site for site in document["sites"]}
        self._specs = parameter_specs(charter.layers)
        self._arrays: tuple[Vector, ArrayRecord] | None = None
        self._m: Vector = np.zeros_like(self.weights)
        self._v: Vector = np.zeros_like(self.weights)
        self._steps = 0  # rounds that gave a model; one that is abandoned moves no optimiser
        self._terms: RoundTerms | None = None
        self._nodes: dict[int, str] = {}
        self._requests: Mapping[str, Message] = {}
        self.blobs: BlobStore | None = None
        self._open_sum: Callable[[Mapping[str, AcceptedUpdate]], Sequence[int]] | None = None
        self._total: Sequence[int] = ()
        self.not_opened: SecureRoundError | None = None

    def open_round(
        self,
        terms: RoundTerms,
        requests: Mapping[str, Message],
        open_sum: Callable[[Mapping[str, AcceptedUpdate]], Sequence[int]] | None = None,
        *,
        nodes: Mapping[int, str] | None = None,
    ) -> None:
        """Say what the coming round's statements must hold, and which message each participant gets.

        `open_sum` returns the sum of accepted updates that are masked; None where they are not. `nodes` are
        the participants by their node; by default the messages are looked at, all of them.
        """
        self._terms, self._open_sum = terms, open_sum
        self._total, self.not_opened = (), None
        if nodes is None:
            nodes = {message.metadata.dst_node_id: site for site, message in requests.items()}
        self._requests, self._nodes = requests, dict(nodes)
        self.accepted, self.rejected, self.too_long = {}, {}, {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Yield one message a participant; nobody is sampled, the charter says who takes part."""
        return (self._requests[site] for site in sorted(self._requests))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Prove each reply, aggregate those that hold, and return the new weights by parameter name.

        `replies` is taken as it comes, and where `blobs` is set an update leaves memory once it is proved; it
        is read again, site by site, when all are there. `accepted` and `rejected` say who counted and who did
        not, and why; `too_long` holds the proved releases that pass the charter's norm bound and so count for
        nothing. With fewer statements than the charter's `minimum_sites` the weights stay as they were and
        nothing is returned.
        """
        terms = self._terms
        if terms is None or terms.round != server_round:
            raise ReplayError(f"round {server_round} was not opened")
        for reply in replies:
            site = self._nodes.get(reply.metadata.src_node_id)
            if site is None or site in self.accepted or site in self.too_long:
                continue
            answer = read_answer(site, reply)
            if answer.failure or "statement" not in answer.header:
                self.rejected[site] = StatementError(site, "reply", answer.failure or "holds no statement")
                continue
            self.offer(site, answer.header["statement"], answer.blobs.get("update", b""))
        if len(self.accepted) < self.charter.minimum_sites:
            return None, None
        if self._open_sum is not None:
            try:
                self._total = self._open_sum(self.accepted)
                self._check_sum()
            except SecureRoundError as error:
                self.not_opened = error
                return None, None
        self.weights = self._step()
        return self.arrays(), MetricRecord({"sites": len(self.accepted)})

    def offer(self, site: str, statement: object, update: bytes) -> None:
        """Prove one release for the open round, come by message or from the log; see `aggregate_train`."""
        if self._terms is None:
            raise ReplayError("no round was opened")
        try:
            self.accepted[site] = verify_statement(self._terms, site, statement, update)
            self.rejected.pop(site, None)
            self._check_length(site)
            if self.blobs is not None:
                self.accepted[site] = self.accepted[site].kept_in(self.blobs)
        except StatementError as error:
            self.rejected[site] = error

    def repeat(
        self,
        updates: Mapping[str, AcceptedUpdate],
        total: Sequence[int] | None = None,
    ) -> Vector:
        """Make a completed round's step again from the releases that it counted; return its weights.

        `total` is their opened sum where they are masked.
        """
        self.accepted, self.rejected, self.too_long = dict(updates), {}, {}
        self._open_sum, self._total = None, ()
        if total is not None:
            self._open_sum, self._total = (lambda _: total), total
        self.weights = self._step()
        return self.weights

    def _check_length(self, site: str) -> None:
        terms = self.update_terms[site]
        if self.plan.rule.norm_bound and is_too_long(terms, self.accepted[site].values):
            self.too_long[site] = self.accepted.pop(site)
            raise StatementError(
                site, "update", f"is longer than {terms.norm_bound} grid units, as no honest one is"
            )

    def _check_sum(self) -> None:
        """Lose a round whose sum no clipped updates make, where the unit is the site: one of them was not.

        Raises:
            SecureRoundError: nobody can tell which, so there is nobody to leave out.
        """
        privacy = self.charter.privacy
        if not privacy.by_site:
            return
        most = longest_sum(
            grid_bits=privacy.grid_bits,
            precision=privacy.precision,
            dimension=self.charter.dimension,
            shares=[found.statement.event.share_grid for found in self.accepted.values()],
        )
        if square_norm(self._total) > most**2:
            raise SecureRoundError("sum", f"is longer than {most} grid units, as no clipped updates make it")

    def arrays(self) -> ArrayRecord:
        """Return the current weights by parameter name."""
        if self._arrays is not None and self._arrays[0] is self.weights:
            return self._arrays[1]
        parts, offset = {}, 0
        for name, shape in self._specs:
            count = math.prod(shape)
            parts[name] = Array(self.weights[offset : offset + count].reshape(shape))
            offset += count
        self._arrays = (self.weights, ArrayRecord(parts))
        return self._arrays[1]

    def _step(self) -> Vector:
        number = self._steps + 1
        plan, d = self.plan, self._pseudo_gradient()
        if plan.strategy == "fedavg":
            result = self.weights + plan.learning_rate * d
        else:
            result = self._adaptive(number, d)
        if not bool(np.isfinite(result).all()):
            raise ReplayError(f"completed round {number} gives weights that are not finite")
        self._steps = number
        return result

    def _pseudo_gradient(self) -> Vector:
        plan, document = self.plan, self._sites
        names = sorted(self.accepted)
        if self._open_sum is not None:
            rows = sum(document[site]["nominal_rows"] for site in names)
            whole = np.array(self._total, dtype=np.int64).astype(np.float64) / plan.divisor(rows)
            acc = combine(plan.rule, (whole,), [float(rows)])
            return spread(plan.spans, -acc if plan.is_gradient else acc, len(self.weights))
        vectors = (
            update_vector(self.accepted[site].update).astype(np.float64)
            / plan.divisor(document[site]["nominal_rows"])
            for site in names
        )
        acc = combine(plan.rule, vectors, [float(document[site]["weight"]) for site in names])
        return spread(plan.spans, -acc if plan.is_gradient else acc, len(self.weights))

    def _adaptive(self, server_round: int, d: Vector) -> Vector:
        raise NotImplementedError


class AffidavitFedAvg(ProvableAggregation, FedAvg):
    """Federated averaging: weights + learning_rate * d."""

    strategy_name = "fedavg"


class AffidavitFedAdam(ProvableAggregation, FedAdam):
    """Flower's FedAdam on the pseudo-gradient d."""

    strategy_name = "fedadam"

    def _adaptive(self, server_round: int, d: Vector) -> Vector:
        beta1, beta2 = self.plan.beta1, self.plan.beta2
        self._m = beta1 * self._m + (1 - beta1) * d
        self._v = beta2 * self._v + (1 - beta2) * (d * d)
        eta = self.plan.learning_rate * math.sqrt(1 - beta2 ** (server_round + 1.0))
        eta = eta / (1 - beta1 ** (server_round + 1.0))
        moved: Vector = self.weights + eta * self._m / (np.sqrt(self._v) + self.plan.tau)
        return moved


class AffidavitFedYogi(ProvableAggregation, FedYogi):
    """Flower's FedYogi on the pseudo-gradient d."""

    strategy_name = "fedyogi"

    def _adaptive(self, server_round: int, d: Vector) -> Vector:
        beta1, beta2 = self.plan.beta1, self.plan.beta2
        self._m = beta1 * self._m + (1 - beta1) * d
        self._v = self._v - (1.0 - beta2) * (d * d) * np.sign(self._v - d * d)
        return self.weights + self.plan.learning_rate * self._m / (np.sqrt(self._v) + self.plan.tau)


Strategy: TypeAlias = AffidavitFedAvg | AffidavitFedAdam | AffidavitFedYogi


def strategy_of(charter: Charter, weights: Sequence[float] | Vector) -> Strategy:
    """Return the charter's strategy, ready for round 1."""
    plan = charter.plan
    adaptive: dict[str, Any] = {
        "eta": float(plan.learning_rate),
        "eta_l": float(plan.local_learning_rate),
        "beta_1": float(plan.beta1),
        "beta_2": float(plan.beta2),
        "tau": float(plan.tau),
    }
    sites: dict[str, Any] = {
        "min_train_nodes": charter.minimum_sites,
        "min_evaluate_nodes": charter.minimum_sites,
        "min_available_nodes": charter.minimum_sites,
    }
    strategy: Strategy
    if plan.strategy == "fedadam":
        strategy = AffidavitFedAdam(**sites, **adaptive)
    elif plan.strategy == "fedyogi":
        strategy = AffidavitFedYogi(**sites, **adaptive)
    else:
        strategy = AffidavitFedAvg(**sites)
    strategy.prepare(charter, weights)
    return strategy
