"""A tiny federation of audit alone: real keys, real entries, real proofs, a place to lie at every step.

`World` keeps its log in memory and gives everybody's keys to the test, so that a test can play the operator,
a site, an officer or a stranger. `before[type]` changes a body before it is signed (the signer lies),
`after[type]` changes it afterwards (somebody else does); both take (world, body) and return a body, or None
to leave it out.
"""

from __future__ import annotations

import base64
import hashlib
import math
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from audit.canonical import canonical_bytes
from audit.charter_view import CharterView, read_charter
from audit.commitments import commit, new_salt
from audit.decimals import decimal_text
from audit.encoding import RowEncoder, plain_row
from audit.entries import (
    ZERO_DIGEST,
    CharterPublished,
    CharterSigned,
    LogCreated,
    MechanismEvent,
    Prediction,
    RoundCompleted,
    RowCommitment,
    RunAccepted,
    RunCompleted,
    RunStarted,
    SiteEnrolled,
    SiteEpsilon,
    SiteStatement,
    SiteUndelivered,
    VersionRegistered,
    VersionTransition,
    event_hash,
    run_digest,
)
from audit.epsilon import rdp_epsilon, recompute
from audit.forward import forward
from audit.keys import SigningKey
from audit.metrics import gate_result
from audit.models import answer_of, initial_weights, model_file, weights_of_file
from audit.public_set import read_public_set
from audit.replay import Aggregator, SiteUpdate, average
from audit.row_tree import RowTree
from audit.verify import Report
from audit.weights import encode_update
from tests.audit_verify.hospitals import FEATURES, ORIGIN, SITES, Hospital, patients, public_csv
from tests.audit_verify.office import Hook, Office


class World(Office):
    """The whole federation. Run it with `train`, `register`, `approve`, `predict`; export with `evidence`."""

    def __init__(
        self,
        *,
        rounds: int = 4,
        before: dict[str, Hook] | None = None,
        after: dict[str, Hook] | None = None,
        charter_changes: Callable[[dict[str, Any]], None] | None = None,
        log_key: SigningKey | None = None,
    ) -> None:
        super().__init__(before=before, after=after, log_key=log_key)
        self.author = SigningKey.generate()
        self.officer, self.second_officer = SigningKey.generate(), SigningKey.generate()
        encoder = RowEncoder(self._features())
        self.hospitals = [
            Hospital(name, [(encoder.encode(row), label) for row, label in patients(count, seed)])
            for seed, (name, count) in enumerate(SITES.items())
        ]
        self.transitions: dict[str, str] = {}
        public = self.put(public_csv())
        document = self._charter(rounds, public)
        if charter_changes:
            charter_changes(document)
        self.canonical = canonical_bytes(document)
        self.charter: CharterView = read_charter(self.canonical)
        self.append(LogCreated(origin=ORIGIN, log_key=self.log_signer.vkey))
        for hospital in self.hospitals:
            self.append(self._enrolment(hospital))
        self.publish_charter()

    @staticmethod
    def _features() -> list[dict[str, Any]]:
        return [
            {"name": name, "type": "number", "unit": "mg", "lower": "0", "upper": "10", "transform": "none",
             "missing": "refuse"}
            for name in FEATURES
        ]  # fmt: skip

    def _charter(self, rounds: int, public: str) -> dict[str, Any]:
        return {
            "affidavit": 1,
            "name": "tiny",
            "task": "binary",
            "features": self._features(),
            "label": {"name": "ill", "classes": ["no", "yes"]},
            "model": {
                "family": "logistic_regression",
                "site_intercept": 1,
                "layers": [
                    {"layer": "linear", "in": len(FEATURES), "out": 1, "bias": 1},
                    {"layer": "site_intercept", "sites": len(self.hospitals), "out": 1},
                ],
            },
            "plan": {
                "strategy": "fedavg", "rounds": rounds, "local_steps": 1, "learning_rate": "4",
                "local_learning_rate": "0.1", "average_last": 2, "beta1": "0.9", "beta2": "0.99",
                "tau": "0.001", "round_timeout_s": 60, "minimum_sites": 2,
            },
            "privacy": {
                "unit": "row", "relation": "add_remove", "epsilon": "6", "delta": "0.00001",
                "sample_rate": "1", "max_grad_norm": "1", "noise_multiplier": "2", "accountant": "pld",
                "grid_bits": 20, "precision": "float64", "subject_id": "", "max_rows_per_subject": 1,
            },
            "sites": [
                {"name": hospital.name, "identity": hospital.identity.text,
                 "nominal_rows": len(hospital.rows), "weight": str(len(hospital.rows))}
                for hospital in self.hospitals
            ],
            "public_set": {"digest": public, "rows": 40},
            "gates": [{"metric": "auc", "source": "public_set", "margin_over_baseline": "0.1"}],
            "purposes": ["research", "triage"],
            "officers": [
                {"name": "Ada", "key": self.officer.text}, {"name": "Bo", "key": self.second_officer.text},
            ],
        }  # fmt: skip

    # the federation's life

    def _enrolment(self, hospital: Hospital) -> SiteEnrolled:
        body = self.lie(
            SiteEnrolled(
                site=hospital.name,
                operator="",
                origin=ORIGIN,
                population=hospital.population,
                identity_key=hospital.identity.text,
                statement_key=hospital.statement.text,
                witness_key=hospital.note_signer.vkey,
                agreement_key=base64.b64encode(bytes(32)).decode(),
                signature="",
                statement_proof="",
                witness_proof="",
            )
        )
        body = self.sign(body, hospital.identity)
        body = self.sign(body, hospital.statement, "statement_proof")
        return self.sign(body, hospital.witness, "witness_proof")

    def publish_charter(self) -> None:
        digest = hashlib.sha256(self.canonical).hexdigest()
        self.append(
            CharterPublished(digest=digest, canonical=self.canonical.decode(), author=self.author.text)
        )
        for hospital in self.hospitals:
            body = self.lie(
                CharterSigned(
                    digest=digest, author=self.author.text, site=hospital.name, signature=""
                )
            )  # fmt: skip
            if body is not None:
                self.append(self.sign(body, hospital.identity))

    def event(self) -> MechanismEvent:
        privacy = self.charter.privacy
        sensitivity = ((1 + (privacy.relation == "replace_one")) << privacy.grid_bits) + 10
        return MechanismEvent(
            mechanism="discrete_gaussian",
            sampling="full" if privacy.sample_rate == "1" else "poisson",
            sample_rate=privacy.sample_rate,
            steps=self.charter.local_steps,
            sigma_grid=math.ceil(float(privacy.noise_multiplier) * sensitivity),
            sensitivity_grid=sensitivity,
            dimension=self.charter.dimension,
            grid_bits=privacy.grid_bits,
            relation=privacy.relation,
            unit=privacy.unit,
        )

    def _update(self, hospital: Hospital, weights: Sequence[float]) -> list[int]:
        position = self.charter.site_names.index(hospital.name)
        slopes, level = (
            weights[: len(FEATURES)],
            weights[len(FEATURES)] + weights[len(FEATURES) + 1 + position],
        )
        total = [0.0] * len(weights)
        for x, label in hospital.rows:
            # written out, because `forward` checks its layers for every row
            score = level + sum(w * v for w, v in zip(slopes, x, strict=True))
            error = 1 / (1 + math.exp(-score)) - label
            gradient = [error * v for v in x] + [error] + [error * (k == position) for k in range(3)]
            norm = math.sqrt(sum(v * v for v in gradient))
            total = [a + b * min(1.0, 1.0 / max(norm, 1e-12)) for a, b in zip(total, gradient, strict=True)]
        if self.charter.local_steps > 1:  # such sites release a difference of weights
            total = [-v / len(hospital.rows) for v in total]
        scale, noise = 2.0**self.charter.privacy.grid_bits, secrets.SystemRandom()
        return [round(v * scale) + round(noise.gauss(0, self.event().sigma_grid)) for v in total]

    def train(self, run: str = "run-1", *, model: str = "tiny") -> str:
        """Carry out a whole run; return the digest of its weights."""
        charter = self.charter
        weights = initial_weights(charter.layers, charter.digest)
        base = self.put(model_file(charter.layers, weights))
        started = self.lie(
            RunStarted(
                run=run, charter=charter.digest, model=model, author=self.author.text,
                sites=charter.site_names, rounds=charter.rounds, initial_model=base,
                code=hashlib.sha256(b"code").hexdigest(), signature="",
            )
        )  # fmt: skip
        started = self.sign(started, self.author)
        self.append(started)
        for hospital in self.hospitals:
            accepted = self.lie(
                RunAccepted(
                    run=run, start=run_digest(started), origin=ORIGIN, charter=charter.digest,
                    site=hospital.name, population=hospital.population,
                    next_sequence=hospital.sequence + 1, previous_event=hospital.head,
                    planned_events=charter.releases, lifetime_epsilon_cap="30", signature="",
                )
            )  # fmt: skip
            self.append(self.sign(accepted, hospital.statement))
        aggregator, previous, outputs = Aggregator(charter.aggregation), ZERO_DIGEST, []
        for number in range(1, charter.rounds + 1):
            weights, base, previous = self.round(run, number, weights, base, previous, aggregator)
            outputs.append(weights)
        digest = self.put(model_file(charter.layers, average(outputs[-charter.aggregation.average_last :])))
        self.append(
            self.lie(
                RunCompleted(
                    run=run,
                    charter=charter.digest,
                    rounds=charter.rounds,
                    last_round=previous,
                    weights=digest,
                )
            )
        )
        return digest

    def round(
        self, run: str, number: int, weights: list[float], base: str, previous: str, aggregator: Aggregator
    ) -> tuple[list[float], str, str]:
        leaves, updates = [], []
        for hospital in self.hospitals:
            values = self._update(hospital, weights)
            _, leaf = self.append(self.statement(hospital, run, number, base, previous, values))
            leaves.append(leaf)
            site = self.charter.site(hospital.name)
            updates.append(
                SiteUpdate(
                    site=hospital.name, nominal_rows=site.nominal_rows, weight=site.weight, values=values
                )
            )
        weights = aggregator.step(number, weights, updates)
        output = self.put(model_file(self.charter.layers, weights))
        completed = self.lie(
            RoundCompleted(
                run=run, round=number, base_model=base, statements=tuple(leaves), missing=(),
                output_model=output, metrics=(),
            )
        )  # fmt: skip
        leaf = self.append(completed)[1] if completed is not None else previous
        return weights, output, leaf

    def statement(
        self, hospital: Hospital, run: str, number: int, base: str, previous: str, values: list[int]
    ) -> SiteStatement:
        body = self.lie(
            SiteStatement(
                run=run, round=number, charter=self.charter.digest, site=hospital.name,
                population=hospital.population, base_model=base, participants=self.charter.site_names,
                agent_code=hashlib.sha256(b"agent").hexdigest(), previous_round=previous, event=self.event(),
                sequence=hospital.sequence + 1, previous_event=hospital.head,
                update=self.put(encode_update(values)), signature="",
            )
        )  # fmt: skip
        hospital.sequence, hospital.head = body.sequence, event_hash(body)
        return self.sign(body, hospital.statement)

    def lose_release(self, hospital: Hospital, run: str, number: int) -> None:
        """A release that was debited, never arrived, and is reported later."""
        body = self.statement(hospital, run, number, "00" * 32, ZERO_DIGEST, [0] * self.charter.dimension)
        self.append(SiteUndelivered(statement=body))

    def register(self, digest: str, run: str = "run-1", *, model: str = "tiny") -> str:
        """Register a run's weights as a version; return the entry's leaf hash."""
        charter = self.charter
        last = charter.aggregation.average_last
        rows, labels = read_public_set(self.blobs[charter.public_set], charter.features, charter.label)
        weights = self.weights(digest)
        outputs = [forward(charter.layers, weights, row) for row in rows]
        gates = tuple(
            gate_result(gate, charter.public_set, charter.task, charter.label, labels, outputs)
            for gate in charter.gates
        )
        body = self.lie(
            VersionRegistered(
                version=digest, model=model, charter=charter.digest, run=run, author=self.author.text,
                averaged_from=charter.rounds - last + 1, averaged_to=charter.rounds, gates=gates,
                epsilons=tuple(self._claim(hospital, run) for hospital in self.hospitals),
            )
        )  # fmt: skip
        return self.append(body)[1]

    def weights(self, digest: str) -> list[float]:
        return weights_of_file(self.charter.layers, self.blobs[digest])

    def _claim(self, hospital: Hospital, run: str) -> SiteEpsilon:
        privacy, delta = self.charter.privacy, float(self.charter.privacy.delta)
        of_run, ever = [self.event()] * self.charter.rounds, [self.event()] * hospital.sequence
        return SiteEpsilon(
            site=hospital.name, population=hospital.population, events=self.charter.rounds,
            run_epsilon=up(recompute(of_run, delta).value), run_epsilon_rdp=up(rdp_epsilon(of_run, delta)),
            lifetime_epsilon=up(recompute(ever, delta).value), delta=decimal_text(privacy.delta),
            accountant="pld", relation=privacy.relation, unit=privacy.unit,
        )  # fmt: skip

    def move(
        self, version: str, registration: str, before: str, after: str, *, key: SigningKey | None = None,
        model: str = "tiny",
    ) -> str:  # fmt: skip
        """Sign and log one transition of a version; return its leaf hash."""
        officer = key or self.officer
        body = self.lie(
            VersionTransition(
                version=version, model=model, charter=self.charter.digest, from_state=before, to_state=after,
                gate_results=registration, previous_transition=self.transitions.get(model, ZERO_DIGEST),
                officer=officer.text, reason="reviewed", signature="",
            )
        )  # fmt: skip
        self.transitions[model] = self.append(self.sign(body, officer))[1]
        return self.transitions[model]

    def approve(self, version: str, registration: str, *, key: SigningKey | None = None) -> str:
        self.move(version, registration, "candidate", "approved", key=key)
        return self.move(version, registration, "approved", "live", key=key)

    def predict(
        self,
        version: str,
        transition: str,
        *,
        answer_by: str | None = None,
        rows: Sequence[dict[str, Any]] = (),
        finish: Callable[..., dict[str, Any]] = lambda answer, encoded, outputs: answer,
        tree: bool = False,
    ) -> tuple[int, list[dict[str, str]]]:
        """Answer with the version (or, lying, with `answer_by`); return leaf index and opened rows.

        `finish` makes of an answer, the encoded row and the outputs what is committed to. With `tree` the
        entry holds the root of the rows, and each row its path.
        """
        charter = self.charter
        weights = self.weights(answer_by or version)
        opened, commitments = [], []
        for row in rows or [{"alpha": 6.1, "beta": 5.0, "gamma": 7}, {"alpha": 3, "beta": 2.5, "gamma": 4}]:
            encoded = RowEncoder(charter.features).encode(row)
            outputs = forward(charter.layers, weights, encoded)
            given = canonical_bytes(plain_row(row))
            answer = answer_of(charter.task, charter.label, outputs)
            answer = canonical_bytes(finish(answer, encoded, outputs))
            salts = new_salt(), new_salt()
            commitments.append(
                RowCommitment(
                    input=commit("input", salts[0], given), output=commit("output", salts[1], answer)
                )
            )
            opened.append(
                {
                    "input_salt": salts[0].hex(), "output_salt": salts[1].hex(), "input": given.decode(),
                    "output": answer.decode(),
                }
            )  # fmt: skip
        held: dict[str, Any] = {"rows": tuple(commitments)}
        if tree:
            rooted = RowTree(commitments)
            held = {"rows": (), "row_count": len(commitments), "rows_root": rooted.root}
            for number, row in enumerate(opened):
                row["row"], row["path"] = str(number), rooted.path(number)
        body = self.lie(
            Prediction(
                request_id=secrets.token_hex(16), model="tiny", version=version, charter=charter.digest,
                transition=transition, purpose="triage", principal=secrets.token_hex(16), role="consumer",
                site="", policies=("consumer-may-predict",), policy_set="ab" * 32, **held,
            )
        )  # fmt: skip
        return self.append(body)[0], opened

    def whole(self) -> tuple[int, list[dict[str, str]]]:
        """Everything up to one prediction."""
        digest = self.train()
        live = self.approve(digest, self.register(digest))
        return self.predict(digest, live)

    def judge(self, **options: Any) -> Report:
        """Go all the way to a prediction, export and verify it against this world's own policy."""
        index, opened = self.whole()
        return self.report(self.evidence(index, opened=opened), **options)


def up(value: float) -> str:
    return decimal_text(math.ceil(value * 10_000) / 10_000)
