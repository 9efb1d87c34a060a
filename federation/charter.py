"""The charter: what the sites agreed on, as one YAML file and as one canonical form whose digest names it.

`Charter.load` reads the file people write; `canonical()` gives the bytes that sites sign and that the log
keeps: every number a canonical decimal string, every layer spelt out, sites by name. Nothing in a charter
is read from data.
"""

from __future__ import annotations

import hashlib
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

from pydantic import BaseModel, Field, StringConstraints, ValidationError, field_validator, model_validator

from audit.canonical import canonical_bytes, parse_canonical
from audit.errors import AuditError
from audit.layers import dimension, shared_spans
from audit.robust import AggregationRule
from audit.secure_round import SecureTerms
from federation._charter_checks import check_charter
from federation._charter_errors import problems_of
from federation._charter_form import canonical_document, fields_of_canonical, yaml_text
from federation._charter_open import NOISE, PLACEHOLDER, placeholder_problems, split_path, with_lines
from federation._charter_serving import Answers, Fairness, Reference
from federation._numbers import Count, Number
from federation.errors import AccountingError, CharterError, CharterFileError, Problem
from federation.families import Layer, cnn, logistic_regression, mlp, normalise_layers
from federation.strict_yaml import parse_yaml

NAME: Final = r"^[a-z0-9][a-z0-9-]{0,62}$"

Text = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Name = Annotated[str, StringConstraints(pattern=NAME)]
FieldName = Annotated[str, StringConstraints(pattern=r"^[^\s\x00-\x1f]([^\x00-\x1f]{0,62}[^\s\x00-\x1f])?$")]
PublicKey = Annotated[str, StringConstraints(pattern=r"^ed25519:[A-Za-z0-9+/]{43}=$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel, frozen=True, extra="forbid"):
    pass


class Feature(_Part):
    """One named input. Bounds are knowledge about the field, never read from anybody's data."""

    name: FieldName
    type: Literal["number", "integer", "boolean", "category"] = "number"
    unit: str = ""
    lower: Number | None = None
    upper: Number | None = None
    categories: tuple[Text, ...] | None = None
    transform: Literal["none", "log"] = "none"
    missing: Literal["refuse", "midpoint"] = "refuse"

    @property
    def width(self) -> int:
        """How many encoded numbers it becomes."""
        return len(self.categories or ()) if self.type == "category" else 1


class Aggregation(_Part):
    """How updates become one: a weighted mean, or a rule that stands `byzantine` lying sites.

    `keep` is for multi_krum; absent: all of a smallest round but the lying ones.
    """

    rule: Literal["mean", "krum", "multi_krum", "median", "trimmed_mean"] = "mean"
    byzantine: Annotated[int, Field(strict=True, ge=0, le=499)] = 0
    keep: Annotated[int, Field(strict=True, ge=0, le=1000)] | None = None
    norm_bound: bool = True


class Evaluation(_Part):
    """Rows that each site keeps out of training, and the noise on how many of them are called right."""

    share: Number = Field(gt=0, lt=1)
    noise_multiplier: Number = Field(gt=0)


class SecureAggregation(_Part):
    """Updates are masked, so that the coordinator reads their sum alone, and the sites share the noise.

    `tolerated`: of all sites, how many may drop out or collude while the others' noise still suffices.
    """

    tolerated: Annotated[int, Field(strict=True, ge=0, le=499)]


class SiteLevel(_Part):
    """A bound on what a whole site contributes, and what the run may cost it; the noise is the sites' own."""

    max_update_norm: Number = Field(gt=0)  # of a site's sum of clipped gradients, in gradient units
    epsilon: Number = Field(gt=0, le=1000)  # for a whole site, at privacy.delta


class Label(_Part):
    name: FieldName
    classes: tuple[Text, ...] | None = None
    lower: Number | None = None
    upper: Number | None = None


class Model(_Part):
    family: Literal["logistic_regression", "linear", "mlp", "cnn", "layers"]
    site_intercept: bool = False
    hidden: tuple[Count, ...] | None = None
    activation: Literal["relu", "tanh", "sigmoid", "gelu"] | None = None
    image: tuple[Count, Count, Count] | None = None
    channels: tuple[Count, ...] | None = None
    layers: tuple[dict[str, Any], ...] | None = None
    local_layers: tuple[Annotated[int, Field(strict=True, ge=0)], ...] = ()  # stay at the site, in no version


class Plan(_Part):
    """How training goes. `average_last` rounds are averaged into the version; absent: the last half."""

    strategy: Literal["fedavg", "fedadam", "fedyogi"] = "fedavg"
    rounds: Count = 30
    spare_rounds: Annotated[int, Field(strict=True, ge=0, le=1000)] = 0  # in place of abandoned ones
    local_steps: Count = 1
    learning_rate: Number = Field(gt=0)
    local_learning_rate: Number = Field(default=Decimal("0.1"), gt=0)
    average_last: Count | None = None
    beta1: Number = Field(default=Decimal("0.9"), ge=0, lt=1)
    beta2: Number = Field(default=Decimal("0.99"), ge=0, lt=1)
    tau: Number = Field(default=Decimal("0.001"), gt=0)
    proximal: Number = Field(default=Decimal("0"), ge=0)  # FedProx's mu, for plans with local steps
    round_timeout_s: Count = 60
    minimum_sites: Count | None = None


class Privacy(_Part):
    """The terms. Those without a default are decisions somebody has to take."""

    unit: Literal["row", "subject", "site"]
    relation: Literal["add_remove", "zero_out", "replace_one"]
    epsilon: Number = Field(gt=0, le=100)
    delta: Number = Field(gt=0, lt=1)
    sample_rate: Number = Field(default=Decimal("1"), gt=0, le=1)
    max_grad_norm: Number | None = Field(default=None, gt=0)  # of a row's or subject's gradient
    max_update_norm: Number | None = Field(default=None, gt=0)  # of a whole site's update, with unit: site
    noise_multiplier: Number = Field(gt=0)
    accountant: Literal["pld"] = "pld"
    grid_bits: Annotated[int, Field(strict=True, ge=8, le=36)] = 20
    precision: Literal["float64", "float32"] = "float64"
    subject_id: str = ""
    max_rows_per_subject: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 1

    @property
    def by_site(self) -> bool:
        """Whether a site as a whole is what noise protects, and nothing smaller."""
        return self.unit == "site"

    @property
    def norm(self) -> Decimal:
        """What one unit's contribution is clipped to; a charter that was checked has it."""
        given = self.max_update_norm if self.by_site else self.max_grad_norm
        return Decimal(0) if given is None else given


class Site(_Part):
    """A member: its identity key, and the public number of rows its weight and normaliser come from.

    Where the unit is the site, that number is 1: each counts once, and how many rows it has is nobody's.
    """

    name: Name
    identity: PublicKey
    nominal_rows: Count
    weight: Number | None = Field(default=None, gt=0)


class PublicSet(_Part):
    digest: Digest
    rows: Count


class Gate(_Part):
    metric: Literal["auc", "accuracy", "r2", "mae"]
    source: str = "public_set"
    floor: Number | None = None
    margin_over_baseline: Number | None = None


class Officer(_Part):
    name: Name
    key: PublicKey


class Charter(_Part):
    """The agreement, checked as a whole: an instance is always usable."""

    affidavit: Literal[1] = 1
    name: Name
    task: Literal["binary", "multiclass", "regression"]
    features: tuple[Feature, ...] = Field(min_length=1, max_length=4096)
    label: Label
    model: Model
    plan: Plan
    privacy: Privacy
    evaluation: Evaluation | None = None
    aggregation: Aggregation | None = None  # absent: the weighted mean, and no bound on an update's length
    reference: Reference | None = None
    answers: Answers | None = None
    fairness: Fairness | None = None
    secure_aggregation: SecureAggregation | None = None
    site_level: SiteLevel | None = None
    sites: tuple[Site, ...] = Field(min_length=1, max_length=1000)
    public_set: PublicSet | None = None
    gates: tuple[Gate, ...] = ()
    purposes: tuple[Name, ...] = Field(min_length=1)
    officers: tuple[Officer, ...] = ()
    # how answers may be used; absent keys keep the digests of charters written before there were any
    decisions: Literal["support", "legal_effect"] | None = None  # GDPR Art. 22: a person must review
    legal_basis: Literal["required"] | None = None  # every request says one (GDPR Art. 6 and 9)
    regions: tuple[Name, ...] = ()  # the only regions that may ask; empty: any
    max_age_days: Count | None = None  # a version answers for so long after its registration

    @field_validator("sites", mode="after")
    @classmethod
    def _sites_by_name(cls, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(sorted(sites, key=lambda site: site.name))

    @field_validator("purposes", mode="after")
    @classmethod
    def _purposes_sorted(cls, purposes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(purposes))

    @field_validator("regions", mode="after")
    @classmethod
    def _regions_sorted(cls, regions: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(regions)))

    @model_validator(mode="after")
    def _usable(self) -> Charter:
        problems = check_charter(self)
        if problems:
            raise CharterError(problems)
        return self

    @classmethod
    def load(cls, path: str | Path) -> Charter:
        """Read the charter at `path`.

        Raises:
            CharterFileError: the file cannot be read or is not the strict YAML.
            CharterError: its content; every problem names line, key and fix.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CharterFileError(f"cannot be read: {error}", source=str(path), line=None) from error
        return cls.parse(text, source=str(path))

    @classmethod
    def parse(cls, text: str, *, source: str = "") -> Charter:
        """Read a charter from YAML text; errors as `load`."""
        document = parse_yaml(text, source=source)
        if not isinstance(document.value, dict):
            raise CharterFileError("is not a mapping of keys to values", source=source, line=1)
        left_open = placeholder_problems(document.value)
        if not left_open or {path for path, _ in left_open} == {NOISE}:
            needed = _noise_needed(cls, document.value)
            left_open = [(NOISE, needed)] if needed else left_open
        if left_open:
            raise with_lines(left_open, document.line_of, source)
        try:
            return cls.model_validate(document.value)
        except CharterError as error:
            raise with_lines(
                [(split_path(p.path), p) for p in error.problems], document.line_of, source
            ) from None
        except ValidationError as error:
            raise with_lines(problems_of(error, cls), document.line_of, source) from None

    @classmethod
    def from_canonical(cls, text: str) -> Charter:
        """Read a charter from its canonical bytes, as the log keeps them; the digest is the same.

        Raises:
            CharterError: the text is not the canonical form of a charter of this release.
        """
        try:
            charter = cls.model_validate(
                fields_of_canonical(cast("dict[str, Any]", parse_canonical(text.encode())))
            )
        except (AuditError, ValidationError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise CharterError([_not_canonical(str(error))]) from error
        if charter.canonical().decode() != text:
            raise CharterError([_not_canonical("it reads back differently")])
        return charter

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The model, spelt out from the closed set of layers."""
        return tuple(resolve_layers(self))

    @property
    def encoded_width(self) -> int:
        """How many numbers a row becomes."""
        return sum(feature.width for feature in self.features)

    @property
    def outputs(self) -> int:
        return len(self.label.classes or ()) if self.task == "multiclass" else 1

    @cached_property
    def dimension(self) -> int:
        """How many numbers an update has."""
        return dimension(self.layers)

    @cached_property
    def released(self) -> int:
        """How many numbers an update has: all but those of layers that stay at the site."""
        return sum(stop - start for start, stop in shared_spans(self.layers, self.model.local_layers))

    @property
    def rule(self) -> AggregationRule:
        """The aggregation rule with nothing left open."""
        part = self.aggregation
        if part is None:
            return AggregationRule()
        usual = {"krum": 1, "multi_krum": max(1, self.minimum_sites - part.byzantine)}.get(part.rule, 0)
        return AggregationRule(
            name=part.rule,
            byzantine=part.byzantine,
            keep=usual if not part.keep else part.keep,
            norm_bound=part.norm_bound,
        )

    @property
    def site_names(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites)

    def site(self, name: str) -> Site:
        """Return the member called `name`; KeyError when there is none."""
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)

    @property
    def average_last(self) -> int:
        """How many of the last rounds make the version."""
        return self.plan.average_last or max(1, self.plan.rounds // 2)

    @property
    def noised_steps(self) -> int:
        """How many noised sums make a release: the local steps, or one where the whole update gets noise."""
        return 1 if self.privacy.by_site else self.plan.local_steps

    @property
    def most_rounds(self) -> int:
        """How many rounds a run may open: those it completes, and the spare ones."""
        return self.plan.rounds + self.plan.spare_rounds

    @property
    def minimum_sites(self) -> int:
        """Fewest sites a round may end with."""
        return self.plan.minimum_sites or len(self.sites)

    @property
    def secure(self) -> SecureTerms | None:
        """The terms of masked rounds, where updates are masked."""
        part = self.secure_aggregation
        if part is None:
            return None
        return SecureTerms(sites=len(self.sites), tolerated=part.tolerated, least=self.minimum_sites)

    @property
    def document(self) -> dict[str, Any]:
        """The canonical form as plain JSON values."""
        return canonical_document(self)

    def canonical(self) -> bytes:
        """Return the bytes that sites sign and the log keeps."""
        return canonical_bytes(self.document)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the canonical bytes: the charter's name."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def to_yaml(self) -> str:
        """Return YAML that `parse` reads back to the same digest."""
        return yaml_text(self)

    def _repr_html_(self) -> str:
        from federation.rendering import charter_html

        return charter_html(self)


def _noise_needed(kind: type[Charter], document: dict[str, Any]) -> Problem | None:
    """Return what to write where nothing but the noise is open; None when it is set, or more is wrong."""
    privacy = document.get("privacy")
    if not isinstance(privacy, dict) or isinstance(privacy.get("noise_multiplier"), (int, Decimal)):
        return None
    from federation.accounting import noise_for

    try:
        charter = kind.model_validate({**document, "privacy": {**privacy, "noise_multiplier": 1}})
        needed = noise_for(charter)
    except (CharterError, ValidationError, AccountingError):
        return None
    message = f"is open; epsilon {charter.privacy.epsilon} needs at least {needed} for this plan"
    return Problem(path="", message=message, fix=f"write noise_multiplier: {needed}")


def _not_canonical(why: str) -> Problem:
    return Problem(
        path="", message=f"not the canonical form of a charter: {why}", fix="use the bytes in the log"
    )


def resolve_layers(charter: Charter) -> list[Layer]:
    """Return the layer list that the charter's model stands for.

    Raises:
        LayerError: the list is malformed.
    """
    model, width, outputs = charter.model, charter.encoded_width, charter.outputs
    sites = len(charter.sites) if model.site_intercept else 0
    activation = model.activation or "relu"
    if model.family == "mlp":
        return mlp(width, outputs, model.hidden or (), activation=activation, sites=sites)
    if model.family == "cnn":
        return cnn(
            width, outputs, model.image or (), model.channels or (), activation=activation, sites=sites
        )
    if model.family == "layers":
        return normalise_layers(model.layers or ())
    return logistic_regression(width, outputs, sites=sites)


__all__ = [
    "PLACEHOLDER",
    "Charter",
    "Feature",
    "Gate",
    "Label",
    "Model",
    "Officer",
    "Plan",
    "Privacy",
    "PublicSet",
    "Site",
]
