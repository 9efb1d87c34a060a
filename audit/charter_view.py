"""A charter as a verifier reads it: from the canonical bytes in the log, strictly, into typed values.

Writing and checking a charter for people is the federation's; this is only what is needed to judge
everything that followed from it. Whatever is malformed is one typed error that names the key.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

from audit.canonical import parse_canonical
from audit.charter_masking import SiteTerms, masked_terms
from audit.charter_parts import CharterFormError, CharterPart
from audit.charter_serving import ServingTerms
from audit.encoding import RowEncoder
from audit.entries import MechanismEvent
from audit.epsilon import RELATIONS
from audit.errors import AuditError
from audit.keys import parse_public_key
from audit.layers import check_layers, check_local_layers, dimension, output_shape, work
from audit.metrics import METRICS_OF_TASK
from audit.models import outputs_of
from audit.private_evaluation import METRIC, SOURCE, Evaluation
from audit.replay import STRATEGIES, AggregationPlan, norm_text
from audit.robust import RULES, AggregationRule, check_rule
from audit.secure_round import SecureTerms
from audit.shared_noise import check_shares
from audit.update_bounds import GRID_SLACK, UpdateTerms, planned_sensitivity

SITE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CharterSite:
    name: str
    identity: str
    nominal_rows: int
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CharterPrivacy:
    unit: str
    relation: str
    epsilon: Decimal
    delta: Decimal
    sample_rate: str
    norm: str  # max_grad_norm of a row or subject, max_update_norm of a site
    noise_multiplier: Decimal
    accountant: str
    grid_bits: int
    precision: str
    subject_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CharterView:
    """All that later steps compare with; `gates`, `features` and `label` stay plain JSON values."""

    digest: str
    name: str
    task: str
    features: tuple[Mapping[str, Any], ...]
    label: Mapping[str, Any]
    layers: tuple[Mapping[str, Any], ...]
    dimension: int
    released: int  # numbers in an update: all but those of layers that stay at the site
    work: int  # multiplications for one example
    rounds: int
    spare_rounds: int  # that may be opened in place of rounds that are abandoned
    local_steps: int
    minimum_sites: int
    aggregation: AggregationPlan
    evaluation: Evaluation | None
    serving: ServingTerms
    updates: Mapping[str, UpdateTerms]  # by site
    secure: SecureTerms | None  # where updates are masked and the noise is shared
    site_level: SiteTerms | None
    privacy: CharterPrivacy
    sites: tuple[CharterSite, ...]
    public_set: str  # digest; "" when the charter declares none
    public_rows: int
    gates: tuple[Mapping[str, Any], ...]
    purposes: tuple[str, ...]
    officers: Mapping[str, str]  # public key to name
    legal_effect: bool = False  # a decision by an answer is final only once a person reviewed it
    needs_legal_basis: bool = False
    regions: tuple[str, ...] = ()  # the only ones that may ask; empty: any
    max_age_days: int = 0  # 0: no limit

    @property
    def most_rounds(self) -> int:
        """How many rounds a run may open; what is released after them has the numbers that follow."""
        return self.rounds + self.spare_rounds

    @property
    def releases(self) -> int:
        """How many releases a run may ask of each site: rounds, then evaluation and sketch if there are."""
        return self.most_rounds + (self.evaluation is not None) + (self.serving.reference is not None)

    @property
    def site_names(self) -> tuple[str, ...]:
        return tuple(site.name for site in self.sites)

    def site(self, name: str) -> CharterSite | None:
        return next((site for site in self.sites if site.name == name), None)

    def event_problem(self, event: MechanismEvent) -> str | None:
        """Return what is wrong with a release's event under this charter, or None.

        The noise must be at least the charter's multiple of a sensitivity that is at least one clipped
        gradient or update (two, under replace-one) on the charter's grid with what floats and rounding add;
        everything else must be as agreed.
        """
        privacy = self.privacy
        agreed: dict[str, str | int] = {
            "mechanism": "discrete_gaussian",
            "sampling": "full" if privacy.sample_rate == "1" else "poisson",
            "sample_rate": privacy.sample_rate,
            "steps": 1 if privacy.unit == "site" else self.local_steps,
            "dimension": self.dimension,
            "grid_bits": privacy.grid_bits,
            "relation": privacy.relation,
            "unit": privacy.unit,
            "sharers": 0 if self.secure is None else self.secure.sharers,
            "site_sensitivity_grid": 0 if self.site_level is None else self.site_level.sensitivity_grid,
        }
        for name, value in agreed.items():
            if getattr(event, name) != value:
                return f"event.{name} is {getattr(event, name)!r}, the charter says {value!r}"
        least = planned_sensitivity(
            grid_bits=privacy.grid_bits,
            dimension=self.dimension,
            relation=privacy.relation,
            precision=privacy.precision,
        )
        if event.sensitivity_grid < least:
            return f"event.sensitivity_grid is {event.sensitivity_grid}, the charter's least is {least}"
        if event.sigma_grid < Fraction(privacy.noise_multiplier) * event.sensitivity_grid:
            ratio = event.sigma_grid / event.sensitivity_grid
            return (
                f"event.sigma_grid is {ratio:.6g} x sensitivity, the charter says {privacy.noise_multiplier}"
            )
        if self.secure is None and event.share_grid:
            return f"event.share_grid is {event.share_grid}, the charter lets no sites share noise"
        try:
            check_shares(event)
        except AuditError as error:
            return str(error)
        return None


def read_charter(canonical: bytes) -> CharterView:
    """Read a charter's canonical bytes.

    Raises:
        CharterFormError: names the key and what is wrong with it.
    """
    try:
        document = parse_canonical(canonical)
    except AuditError as error:
        raise CharterFormError("bytes", str(error)) from error
    top = CharterPart(document, "", optional=_TOP_OPTIONAL, fields=_TOP)
    if top.value["affidavit"] != 1:
        raise CharterFormError("affidavit", "is not a version this release reads")
    task = top.choice("task", tuple(METRICS_OF_TASK))
    plan = CharterPart(top.value["plan"], "plan", fields=_PLAN, optional=("proximal", "spare_rounds"))
    privacy = _privacy_part(top)
    sites = tuple(_site(value, f"sites[{i}]") for i, value in enumerate(top.items("sites")))
    names = [site.name for site in sites]
    if not names or names != sorted(set(names)):
        raise CharterFormError("sites", "are not one or more, each once, in the order of their names")
    if len({site.identity for site in sites}) != len(sites):
        raise CharterFormError("sites", "two have one identity key")
    features = tuple(_feature(value, f"features[{i}]") for i, value in enumerate(top.items("features")))
    if not features or len({feature["name"] for feature in features}) != len(features):
        raise CharterFormError("features", "are not one or more, each named once")
    label = _label(top.value["label"], task)
    public = top.value.get("public_set")
    digest, rows = _public_set(public) if public is not None else ("", 0)
    rounds = plan.count("rounds", least=1)
    minimum_sites = plan.count("minimum_sites", least=1)
    average_last = plan.count("average_last", least=1)
    if minimum_sites > len(sites) or average_last > rounds:
        raise CharterFormError("plan", "minimum_sites or average_last is more than there are")
    if plan.count("grid_bits", least=1, source=privacy) > 62:
        raise CharterFormError("privacy.grid_bits", "is more than an integer update can hold")
    _check_numbers(plan, privacy)
    layers, cost = _layers(top, features, label, task)
    size = dimension(layers)
    _check_aggregation(top, minimum_sites)
    aggregation = AggregationPlan.of_charter(top.value)
    released = sum(stop - start for start, stop in aggregation.spans) or size
    terms = CharterPrivacy(
        unit=privacy.choice("unit", ("row", "subject", "site")),
        relation=privacy.choice("relation", RELATIONS),
        epsilon=privacy.decimal("epsilon"),
        delta=privacy.decimal("delta"),
        sample_rate=privacy.text("sample_rate"),
        norm=norm_text(privacy.value),
        noise_multiplier=privacy.decimal("noise_multiplier"),
        accountant=privacy.text("accountant"),
        grid_bits=privacy.count("grid_bits", least=1),
        precision=privacy.choice("precision", tuple(GRID_SLACK)),
        subject_id=privacy.text("subject_id"),
    )
    try:
        secure, site_level = masked_terms(top.value, dimension=size)
    except AuditError as error:
        raise CharterFormError("secure_aggregation or site_level", str(error)) from error
    view = CharterView(
        digest=hashlib.sha256(canonical).hexdigest(),
        name=top.text("name"),
        task=task,
        features=features,
        label=label,
        layers=layers,
        dimension=size,
        released=released,
        work=cost,
        rounds=rounds,
        spare_rounds=plan.count("spare_rounds", least=1) if "spare_rounds" in plan.value else 0,
        local_steps=plan.count("local_steps", least=1),
        minimum_sites=minimum_sites,
        aggregation=aggregation,
        evaluation=_evaluation(top),
        serving=_serving(top),
        updates={
            name: UpdateTerms.of_charter(top.value, name, dimension=size, released=released) for name in names
        },
        secure=secure,
        site_level=site_level,
        privacy=terms,
        sites=sites,
        public_set=digest,
        public_rows=rows,
        gates=tuple(_gate(value, f"gates[{i}]", task) for i, value in enumerate(top.items("gates"))),
        purposes=tuple(top.texts("purposes")),
        officers=_officers(top),
        legal_effect="decisions" in top.value and bool(top.choice("decisions", ("legal_effect",))),
        needs_legal_basis="legal_basis" in top.value and bool(top.choice("legal_basis", ("required",))),
        regions=_regions(top),
        max_age_days=top.count("max_age_days", least=1) if "max_age_days" in top.value else 0,
    )
    if view.privacy.unit == "subject" and not view.privacy.subject_id:
        raise CharterFormError("privacy.subject_id", 'is empty, so the unit can only be "row"')
    return view


_TOP: Final = (
    "affidavit", "name", "task", "features", "label", "model", "plan", "privacy", "sites", "gates",
    "purposes", "officers",
)  # fmt: skip
_TOP_OPTIONAL: Final = (
    "public_set", "aggregation", "evaluation", "secure_aggregation", "site_level", "reference", "answers",
    "fairness", "decisions", "legal_basis", "regions", "max_age_days",
)  # fmt: skip
_PLAN: Final = (
    "strategy", "rounds", "local_steps", "learning_rate", "local_learning_rate", "average_last", "beta1",
    "beta2", "tau", "round_timeout_s", "minimum_sites",
)  # fmt: skip
_PRIVACY: Final = (
    "unit", "relation", "epsilon", "delta", "sample_rate", "max_grad_norm", "noise_multiplier", "accountant",
    "grid_bits", "precision", "subject_id", "max_rows_per_subject",
)  # fmt: skip


def _privacy_part(top: CharterPart) -> CharterPart:
    value = top.value["privacy"]
    named = _norm_key(value) if isinstance(value, dict) else "max_grad_norm"
    fields = tuple(named if key == "max_grad_norm" else key for key in _PRIVACY)
    return CharterPart(value, "privacy", fields=fields)


def _norm_key(privacy: Mapping[str, Any]) -> str:
    return "max_update_norm" if privacy.get("unit") == "site" else "max_grad_norm"


def _check_numbers(plan: CharterPart, privacy: CharterPart) -> None:
    zero, one = Decimal(0), Decimal(1)
    plan.choice("strategy", STRATEGIES)
    for key in ("learning_rate", "local_learning_rate", "tau"):
        plan.decimal(key, above=zero)
    for key in ("beta1", "beta2"):
        if plan.decimal(key, least=zero) >= one:
            raise plan.fail(key, "is not below 1")
    if "proximal" in plan.value:
        drawn = plan.decimal("proximal", above=zero) * plan.decimal("local_learning_rate", above=zero)
        if plan.value["local_steps"] == 1 or drawn > one:
            raise plan.fail("proximal", "needs local steps, and at most 1 with the local learning rate")
    plan.count("round_timeout_s", least=1)
    for key in ("epsilon", _norm_key(privacy.value), "noise_multiplier"):
        privacy.decimal(key, above=zero)
    if privacy.decimal("delta", above=zero) >= one:
        raise privacy.fail("delta", "is not below 1")
    if privacy.decimal("sample_rate", above=zero) > one:
        raise privacy.fail("sample_rate", "is above 1")
    several = privacy.count("max_rows_per_subject", least=1) > 1
    if several and privacy.decimal("sample_rate", above=zero) < one:
        raise privacy.fail("sample_rate", "is below 1, while a subject may have several rows")


def _evaluation(top: CharterPart) -> Evaluation | None:
    if "evaluation" not in top.value:
        return None
    part = CharterPart(top.value["evaluation"], "evaluation", fields=("share", "noise_multiplier"))
    part.decimal("share", above=Decimal(0)), part.decimal("noise_multiplier", above=Decimal(0))
    try:
        return Evaluation.of_charter(top.value)
    except AuditError as error:
        raise CharterFormError("evaluation", str(error)) from error


def _serving(top: CharterPart) -> ServingTerms:
    try:
        return ServingTerms.of_charter(top.value)
    except AuditError as error:
        raise CharterFormError("reference, answers or fairness", str(error)) from error


def _check_aggregation(top: CharterPart, minimum_sites: int) -> None:
    if "aggregation" not in top.value:
        return
    fields = ("rule", "byzantine", "keep", "norm_bound")
    part = CharterPart(top.value["aggregation"], "aggregation", fields=fields)
    part.choice("rule", RULES)
    part.count("byzantine"), part.count("keep")
    if part.count("norm_bound") > 1:
        raise part.fail("norm_bound", "is 0 or 1")
    try:
        check_rule(AggregationRule.of_charter(top.value), minimum_sites)
    except AuditError as error:
        raise CharterFormError("aggregation", str(error)) from error


def _site(value: Any, path: str) -> CharterSite:
    part = CharterPart(value, path, fields=("name", "identity", "nominal_rows", "weight"))
    if not SITE_NAME.fullmatch(part.text("name")):
        raise part.fail("name", "is not a site's name")
    return CharterSite(
        name=part.text("name"),
        identity=_key(part, "identity"),
        nominal_rows=part.count("nominal_rows", least=1),
        weight=float(part.decimal("weight", above=Decimal(0))),
    )


def _key(part: CharterPart, key: str) -> str:
    try:
        parse_public_key(part.text(key))
    except AuditError as error:
        raise part.fail(key, str(error)) from error
    return part.text(key)


def _feature(value: Any, path: str) -> Mapping[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    more: tuple[str, ...] = ("lower", "upper", "transform")
    if kind == "category":
        more = ("categories",)
    elif kind == "boolean":
        more = ()
    part = CharterPart(value, path, fields=("name", "type", "unit", "missing", *more))
    part.choice("type", ("number", "integer", "boolean", "category"))
    part.choice("missing", ("refuse", "midpoint"))
    part.text("name"), part.text("unit")
    if kind == "category" and not part.texts("categories"):
        raise part.fail("categories", "are none")
    if kind in ("number", "integer"):
        part.choice("transform", ("none", "log"))
        part.decimal("upper", above=part.decimal("lower"))
    return part.value


def _label(value: Any, task: str) -> Mapping[str, Any]:
    fields = ("name", "lower", "upper") if task == "regression" else ("name", "classes")
    part = CharterPart(value, "label", fields=fields)
    part.text("name")
    if task == "regression":
        part.decimal("upper", above=part.decimal("lower"))
        return part.value
    count = len(part.texts("classes"))
    if count < 2 or (task == "binary" and count != 2):
        raise part.fail("classes", f"{count} classes do not make a {task} task")
    return part.value


def _layers(
    top: CharterPart, features: tuple[Mapping[str, Any], ...], label: Mapping[str, Any], task: str
) -> tuple[tuple[Mapping[str, Any], ...], int]:
    model = CharterPart(
        top.value["model"], "model", fields=("family", "site_intercept", "layers"), optional=("local_layers",)
    )
    model.text("family"), model.count("site_intercept")
    layers = model.items("layers")
    try:
        check_layers(layers)
        shape = output_shape(layers, (RowEncoder(features).size,))
        cost = work(layers, (RowEncoder(features).size,))
    except AuditError as error:
        raise CharterFormError("model.layers", str(error)) from error
    if shape != (outputs_of(task, label),):
        raise CharterFormError("model.layers", f"give outputs of shape {shape} for a {task} task")
    for index, layer in enumerate(layers):
        if layer["layer"] == "site_intercept" and layer["sites"] != len(top.items("sites")):
            raise CharterFormError(f"model.layers[{index}].sites", "is not the number of sites")
    if "local_layers" in model.value:
        try:
            check_local_layers(layers, model.items("local_layers"))
        except AuditError as error:
            raise CharterFormError("model.local_layers", str(error)) from error
    return tuple(layers), cost


def _public_set(value: Any) -> tuple[str, int]:
    part = CharterPart(value, "public_set", fields=("digest", "rows"))
    if not _DIGEST.fullmatch(part.text("digest")):
        raise part.fail("digest", "is not a lower-case hex SHA-256")
    return part.text("digest"), part.count("rows", least=1)


def _gate(value: Any, path: str, task: str) -> Mapping[str, Any]:
    part = CharterPart(value, path, fields=("metric", "source"), optional=("floor", "margin_over_baseline"))
    part.choice("metric", METRICS_OF_TASK[task])
    if part.choice("source", ("public_set", SOURCE)) == SOURCE and part.value["metric"] != METRIC:
        raise part.fail("metric", f"of a private release is {METRIC}")
    for key in ("floor", "margin_over_baseline"):
        if key in part.value:
            part.decimal(key)
    if len(part.value) < 3:
        raise part.fail("floor", "and margin_over_baseline are both absent, so nothing could fail")
    return part.value


def _regions(top: CharterPart) -> tuple[str, ...]:
    if "regions" not in top.value:
        return ()
    regions = top.texts("regions")
    if not regions or regions != sorted(regions) or not all(map(SITE_NAME.fullmatch, regions)):
        raise top.fail("regions", "are not one or more names, each once, in order")
    return tuple(regions)


def _officers(top: CharterPart) -> dict[str, str]:
    officers: dict[str, str] = {}
    for index, value in enumerate(top.items("officers")):
        part = CharterPart(value, f"officers[{index}]", fields=("name", "key"))
        officers[_key(part, "key")] = part.text("name")
    return officers
