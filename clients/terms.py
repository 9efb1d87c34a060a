"""What an agreed charter asks of one site, read from its canonical form: all that an agent accepts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, cast

from audit.canonical import canonical_bytes, parse_canonical
from audit.charter_view import CharterView, read_charter
from audit.decimals import parse_decimal
from audit.encoding import RowEncoder
from audit.entries import MechanismEvent
from audit.epsilon import check_event
from audit.errors import AuditError
from audit.layers import shared_spans
from audit.models import dimension
from audit.private_evaluation import Evaluation
from audit.reference import Reference
from audit.replay import norm_text
from audit.secure_round import SecureTerms
from audit.shared_noise import share_grid, site_sensitivity_grid
from audit.units import SITE
from clients.dp.errors import DPError
from clients.dp.grid import Precision, Relation, check_clip, sensitivity_grid, sigma_grid, sum_limit
from clients.errors import RefusedError
from federation.flat import initial_vector, model_pieces

if TYPE_CHECKING:
    from clients.dp.losses import Loss  # torch is the trainer's; who reads a charter needs none of it

LOSSES: Final[dict[str, Loss]] = {
    "binary": "binary_cross_entropy",
    "multiclass": "cross_entropy",
    "regression": "squared_error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """One charter, as it binds one site; every field is a constant of the charter."""

    digest: str
    task: str
    features: tuple[Mapping[str, Any], ...]
    label: Mapping[str, Any]
    layers: tuple[Mapping[str, Any], ...]
    rounds: int  # that a run completes
    spare_rounds: int  # that may be opened in place of abandoned ones
    local_steps: int
    local_learning_rate: float
    proximal: float
    average_last: int
    spans: tuple[tuple[int, int], ...]  # of the flat vector, what is released; empty: all of it
    minimum_sites: int
    epsilon: Decimal  # what a run may cost at `delta`, as the charter promises
    delta: Decimal
    max_grad_norm: float  # C of a row or subject; of a site's whole update where that is the unit
    noise_multiplier: Fraction
    sample_rate: Fraction
    relation: Relation
    precision: Precision
    subject_id: str
    max_rows_per_subject: int
    purposes: tuple[str, ...]
    sites: tuple[str, ...]  # sorted
    identities: Mapping[str, str]
    nominal_rows: int  # of this site
    site_index: int
    event: MechanismEvent  # the same in every round
    secure: SecureTerms | None  # where updates are masked and the noise is shared
    site_epsilon: Decimal | None  # what a run may cost this site as a whole; None: nothing is promised
    max_update_norm: Decimal | None  # of the whole site's sum, in gradient units
    evaluation: Evaluation | None
    reference: Reference | None

    @property
    def loss(self) -> Loss:
        return LOSSES[self.task]

    def masks(self, number: int) -> bool:
        """Whether the release of this number is masked: every round, and no evaluation."""
        return self.secure is not None and number <= self.most_rounds

    @property
    def most_rounds(self) -> int:
        """How many rounds a run may open."""
        return self.rounds + self.spare_rounds

    @property
    def by_site(self) -> bool:
        """Whether the unit is this site as a whole: its update is clipped and noised, its rows are not."""
        return self.event.unit == SITE

    @property
    def planned(self) -> tuple[MechanismEvent, ...]:
        """Every release that a run may ask for, in order."""
        rounds = (self.event,) * self.most_rounds
        return (*rounds, *(terms.event for terms in self.after))

    @property
    def releases(self) -> int:
        """How many releases a run may ask for."""
        return self.most_rounds + len(self.after)

    def event_of(self, number: int) -> MechanismEvent:
        """Return the event of one release, counted from 1."""
        return self.event if number <= self.most_rounds else self.after[number - self.most_rounds - 1].event

    @property
    def after(self) -> tuple[Evaluation | Reference, ...]:
        """What is released once after the last round, in order."""
        return tuple(terms for terms in (self.evaluation, self.reference) if terms is not None)

    @property
    def normaliser(self) -> float:
        """What a noisy sum is divided by inside local steps: public rows times sample rate."""
        return float(self.nominal_rows * self.sample_rate)

    @property
    def initial_digest(self) -> str:
        """Digest of the model file that the charter fixes as the start of every run."""
        return _initial_digest(canonical_bytes(self.layers), self.digest)


@lru_cache(maxsize=16)
def _initial_digest(layers: bytes, digest: str) -> str:
    parsed = cast("list[Any]", parse_canonical(layers))
    hashed = hashlib.sha256()
    for piece in model_pieces(parsed, initial_vector(parsed, digest)):
        hashed.update(piece)
    return hashed.hexdigest()


@lru_cache(maxsize=2)
def _read(canonical: bytes) -> tuple[CharterView, dict[str, Any]]:
    """Read a charter once, for however many sites of this process; nobody changes what comes out."""
    return read_charter(canonical), cast("dict[str, Any]", parse_canonical(canonical))


@lru_cache(maxsize=4)
def charter_digest(canonical: str) -> str:
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_terms(canonical: str, *, site: str) -> Terms:
    """Read the canonical text of a charter for `site`.

    Raises:
        RefusedError: it is not a charter, does not name the site, or asks for what this agent cannot give.
    """
    try:
        view, document = _read(canonical.encode())
        terms = _terms(document, charter_digest(canonical), site)
        problem = view.event_problem(terms.event)
    except (AuditError, DPError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RefusedError("bad_request", f"the charter cannot be read: {error!r}") from error
    if problem is not None:  # what this agent would release is not what a verifier reads in the charter
        raise RefusedError("bad_request", f"the charter's terms and this agent's event differ: {problem}")
    return terms


def _terms(document: dict[str, Any], digest: str, site: str) -> Terms:
    plan, privacy = document["plan"], document["privacy"]
    members = {member["name"]: member for member in document["sites"]}
    if site not in members:
        raise RefusedError("charter_not_approved", f"the charter has no member called {site!r}")
    sites = tuple(sorted(members))
    layers = tuple(document["model"]["layers"])
    features = tuple(document["features"])
    RowEncoder(features)
    subject = privacy["unit"] == "subject"
    local = document["model"].get("local_layers", ())
    rate = Fraction(parse_decimal(privacy["sample_rate"]))
    rows = int(privacy["max_rows_per_subject"]) if subject else 1
    if subject and not privacy["subject_id"]:
        raise RefusedError(
            "charter_not_approved", "privacy.unit is subject, but no column identifies a subject"
        )
    if rows > 1 and rate < 1:
        raise RefusedError(
            "charter_not_approved",
            "rows are sampled one by one, which gains nothing for a subject with several; set sample_rate: 1",
        )
    secure = SecureTerms.of_charter(document)
    whole = document.get("site_level")
    clip = parse_decimal(norm_text(privacy))
    check_clip(clip, rows_per_unit=rows, precision=privacy["precision"])
    return Terms(
        digest=digest,
        task=document["task"],
        features=features,
        label=document["label"],
        layers=layers,
        rounds=int(plan["rounds"]),
        spare_rounds=int(plan.get("spare_rounds", 0)),
        local_steps=int(plan["local_steps"]),
        local_learning_rate=float(parse_decimal(plan["local_learning_rate"])),
        proximal=float(parse_decimal(plan.get("proximal", "0"))),
        average_last=int(plan["average_last"]),
        spans=shared_spans(layers, local) if local else (),
        minimum_sites=int(plan["minimum_sites"]),
        epsilon=parse_decimal(privacy["epsilon"]),
        delta=parse_decimal(privacy["delta"]),
        max_grad_norm=float(clip),
        noise_multiplier=Fraction(parse_decimal(privacy["noise_multiplier"])),
        sample_rate=rate,
        relation=privacy["relation"],
        precision=privacy["precision"],
        subject_id=privacy["subject_id"] if subject else "",
        max_rows_per_subject=rows,
        purposes=tuple(document["purposes"]),
        sites=sites,
        identities={name: member["identity"] for name, member in members.items()},
        nominal_rows=int(members[site]["nominal_rows"]),
        site_index=sites.index(site),
        event=_event(plan, privacy, dimension(layers), secure, whole),
        secure=secure,
        site_epsilon=None if whole is None else parse_decimal(whole["epsilon"]),
        max_update_norm=None if whole is None else parse_decimal(whole["max_update_norm"]),
        evaluation=Evaluation.of_charter(document),
        reference=Reference.of_charter(document),
    )


def _event(
    plan: dict[str, Any],
    privacy: dict[str, Any],
    parameters: int,
    secure: SecureTerms | None,
    whole: dict[str, Any] | None,
) -> MechanismEvent:
    sensitivity = sensitivity_grid(
        grid_bits=privacy["grid_bits"],
        dimension=parameters,
        relation=privacy["relation"],
        precision=privacy["precision"],
    )
    sigma = sigma_grid(
        noise_multiplier=Fraction(parse_decimal(privacy["noise_multiplier"])), sensitivity=sensitivity
    )
    share = 0 if secure is None else share_grid(sigma, secure.sharers)
    sites = 1 if secure is None else secure.sites
    sum_limit(grid_bits=privacy["grid_bits"], sigma=share or sigma, steps=1, sites=sites)
    event = MechanismEvent(
        mechanism="discrete_gaussian",
        sampling="full" if privacy["sample_rate"] == "1" else "poisson",
        sample_rate=privacy["sample_rate"],
        steps=1 if privacy["unit"] == SITE else int(plan["local_steps"]),
        sigma_grid=sigma,
        sensitivity_grid=sensitivity,
        dimension=parameters,
        grid_bits=privacy["grid_bits"],
        relation=privacy["relation"],
        unit=privacy["unit"],
        share_grid=share,
        sharers=0 if secure is None else secure.sharers,
        site_sensitivity_grid=0
        if whole is None
        else site_sensitivity_grid(
            grid_bits=privacy["grid_bits"],
            max_grad_norm=parse_decimal(norm_text(privacy)),
            max_update_norm=parse_decimal(whole["max_update_norm"]),
            dimension=parameters,
            precision=privacy["precision"],
        ),
    )
    check_event(event)
    return event
