"""Counters and histograms for Prometheus, one registry an application; no label is a caller's own word.

With several workers (`server.metric_files`) whichever is asked adds up everybody's.
"""

from __future__ import annotations

from math import inf
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from server import metric_room
from server.metric_files import folder_of, forget_dead, reading
from server.tallies import Tallies

if TYPE_CHECKING:
    from audit.ledger import Ledger

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_SCORES: Final = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Monitoring:
    """What an operator watches."""

    def __init__(self) -> None:
        metric_room.install()
        self.registry = CollectorRegistry(auto_describe=True)
        self.requests = Counter(
            "affidavit_http_requests",
            "HTTP requests answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "affidavit_http_request_seconds",
            "Seconds from a request's arrival to its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.predicted_rows = Counter(
            "affidavit_predicted_rows", "Rows answered.", ("model",), registry=self.registry
        )
        self.cached = Counter(
            "affidavit_answer_cache",
            "Requests whose charter allows the outputs of a moment ago, by whether they were there.",
            ("result",),
            registry=self.registry,
        )
        self.shadowed = Counter(
            "affidavit_shadow_rows",
            "Rows that a shadow version was asked, by how its label compares; skipped under load, "
            "refused where the policies would not let it answer.",
            ("model", "outcome"),
            registry=self.registry,
        )
        self.canary_passed = Counter(
            "affidavit_canary_passed",
            "Requests drawn to a canary that could not answer them, and answered by the live version.",
            ("model",),
            registry=self.registry,
        )
        self.denials = Counter(
            "affidavit_denials",
            "Requests refused, by the policy that decided.",
            ("action", "policy"),
            registry=self.registry,
        )
        self.spoofed_identities = Counter(
            "affidavit_spoofed_identities",
            "Client certificates claimed from an address that is no trusted proxy's.",
            registry=self.registry,
        )
        self.append_seconds = Histogram(
            "affidavit_ledger_append_seconds",
            "Seconds until entries that were appended together were durable.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.append_failures = Counter(
            "affidavit_ledger_append_failures",
            "Entries that did not become durable; their requests got no answer.",
            registry=self.registry,
        )
        self.tree_size = Gauge(
            "affidavit_log_tree_size",
            "Entries in the log.",
            registry=self.registry,
            multiprocess_mode="max",
        )
        self.checkpoint_size = Gauge(
            "affidavit_log_checkpoint_size",
            "Entries under the newest signed checkpoint.",
            registry=self.registry,
            multiprocess_mode="max",
        )
        self.cosignatures = Counter(
            "affidavit_cosignatures", "Cosignatures accepted from witnesses.", registry=self.registry
        )
        self.in_flight = Gauge(
            "affidavit_http_requests_in_flight",
            "Requests that arrived and are not answered yet.",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.shed = Counter(
            "affidavit_shed_requests",
            "Requests told to come back later, unread, so that the others keep their pace.",
            ("reason",),
            registry=self.registry,
        )
        self.ood_score = Histogram(
            "affidavit_ood_score",
            "How far a row lies from what the model was trained on, by sketch or by bounds.",
            ("model", "basis"),
            buckets=_SCORES,
            registry=self.registry,
        )
        self.ood_rows = Counter(
            "affidavit_ood_rows",
            "Rows beyond the limit that sketch or bounds set.",
            ("model", "basis"),
            registry=self.registry,
        )
        self.explain_seconds = Histogram(
            "affidavit_explain_seconds",
            "Seconds until a request's attributions were there, or given up.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.certificate_seconds = Gauge(
            "affidavit_certificate_seconds_left",
            "Seconds until a certificate of this coordinator ends; what renews itself starts over in time.",
            ("name",),
            registry=self.registry,
            multiprocess_mode="mostrecent",
        )
        self.node_key_seconds = Gauge(
            "affidavit_node_key_seconds_left",
            "Seconds until the first of the members' node keys ends.",
            registry=None,  # a gauge that nobody set says 0, which here would mean that a key has ended
            multiprocess_mode="mostrecent",
        )
        self.tallies = Tallies(self.in_flight)
        self._has_network, self._looking = False, Lock()
        self._answered: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._rows: dict[str, Counter] = {}
        self._scored: dict[tuple[str, str], tuple[Histogram, Counter]] = {}
        self.alarms = Counter(
            "affidavit_alarms",
            "Alarms that this server raised.",
            ("model", "kind"),
            registry=self.registry,
        )

    # What each answer counts, by children looked up once: no label is a caller's word, so they are few.

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request and its time."""
        found = self._answered.get((method, route, status))
        if found is None:
            found = self.requests.labels(method, route, str(status)), self.seconds.labels(route)
            self._answered[method, route, status] = found
        self.tallies.count(found[0])
        self.tallies.observe(found[1], seconds)

    def predicted(self, model: str, rows: int) -> None:
        """Count answered rows."""
        found = self._rows.get(model)
        if found is None:
            found = self._rows[model] = self.predicted_rows.labels(model)
        self.tallies.count(found, rows)

    def scored(self, model: str, basis: str, score: float, is_out: bool) -> None:
        """Count how far a row lies from what its model was trained on."""
        found = self._scored.get((model, basis))
        if found is None:
            found = self.ood_score.labels(model, basis), self.ood_rows.labels(model, basis)
            self._scored[model, basis] = found
        self.tallies.observe(found[0], score)
        if is_out:
            self.tallies.count(found[1])

    def look_at_network(self, home: Path, ledger: Ledger) -> None:
        """Take what the coordinator's network part says of its ends; without one nothing is said.

        Of several workers the one that looked last counts: another's older word knows no renewal.
        """
        if not (home / "network" / "network.yaml").is_file():
            return
        from federation.network.roster import seconds_left
        from federation.network.settings import NetworkHome

        for state in NetworkHome.open(home).pki.states():
            self.certificate_seconds.labels(state.name).set(state.left.total_seconds())
        soonest = seconds_left(ledger)
        self.node_key_seconds.set(inf if soonest is None else soonest)
        with self._looking:
            if not self._has_network:
                self.registry.register(self.node_key_seconds)
                self._has_network = True

    def render(self) -> bytes:
        """Return the exposition text, format 0.0.4; of all workers, where there are several."""
        self.tallies.flush()
        folder = folder_of()
        if folder is None:
            return generate_latest(self.registry)
        if not folder.is_dir():  # somebody removed it; the values of this worker are those it keeps
            return generate_latest(self.registry)
        forget_dead(folder)
        everybody = CollectorRegistry(auto_describe=True)
        MultiProcessCollector(everybody, path=str(folder))  # type: ignore[no-untyped-call]  # has no types
        with reading(folder):
            return generate_latest(everybody)
