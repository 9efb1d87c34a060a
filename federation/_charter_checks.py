"""What one field alone cannot show: bounds, names, models, gates and terms that contradict each other."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import TYPE_CHECKING

from audit.errors import AuditError
from audit.keys import parse_public_key
from audit.metrics import LOWER_IS_BETTER, METRICS_OF_TASK
from audit.private_evaluation import SOURCE
from federation._aggregation_checks import check_aggregation, check_local_training
from federation._charter_serving import check_serving
from federation._evaluation_checks import check_evaluation, check_private_gate
from federation._secure_checks import check_grid, check_secure
from federation._site_unit_checks import check_norm, check_site_unit, site_unit_warnings
from federation.errors import LayerError, Problem
from federation.families import check_layers

if TYPE_CHECKING:
    from federation.charter import Charter, Feature

_FAMILY_FIELDS = {
    "logistic_regression": (),
    "linear": (),
    "mlp": ("hidden", "activation"),
    "cnn": ("image", "channels", "activation"),
    "layers": ("layers",),
}
_REQUIRED = {"mlp": ("hidden",), "cnn": ("image", "channels"), "layers": ("layers",)}


def check_charter(charter: Charter) -> list[Problem]:
    """Return every contradiction in a charter whose fields are each of their kind."""
    found = [
        *_features(charter),
        *_label(charter),
        *_plan(charter),
        *_privacy(charter),
        *_members(charter),
        *_gates(charter),
        *check_aggregation(charter),
        *check_evaluation(charter),
        *check_serving(charter),
        *check_secure(charter),
        *check_site_unit(charter),
    ]
    found = found or [*_model(charter), *check_local_training(charter)]
    return found or [*check_grid(charter)]


def warnings_of(charter: Charter) -> list[str]:
    """Return what is allowed and still worth a second look."""
    said = []
    smallest = min(site.nominal_rows for site in charter.sites)
    if charter.privacy.by_site:
        said += site_unit_warnings(charter)
    elif charter.privacy.delta >= Decimal(1) / smallest:
        said.append(
            f"delta {charter.privacy.delta} is not below 1/{smallest} (the smallest site): it permits "
            "publishing a whole row now and then; choose a delta well below 1/n"
        )
    if not charter.gates:
        said.append("no gates: a version can be registered, and nothing says it is any good")
    if not charter.officers:
        said.append("no officers: no version can ever be approved under this charter")
    if charter.privacy.unit == "row":
        said.append("the unit is one row: a person with several rows has less protection than epsilon says")
    if len(charter.sites) == 1:
        said.append("only one site: nothing is federated")
    return said


def _features(charter: Charter) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for index, feature in enumerate(charter.features):
        path = f"features[{index}]"
        if feature.name in seen:
            yield Problem(
                path=f"{path}.name",
                message=f"{feature.name!r} is feature {seen[feature.name] + 1} already",
                fix="rename or remove one of them",
            )
        seen.setdefault(feature.name, index)
        if feature.name == charter.label.name:
            yield Problem(path=f"{path}.name", message="is the label", fix="remove it from the features")
        yield from _feature(feature, path)


def _feature(feature: Feature, path: str) -> Iterator[Problem]:
    numeric = feature.type in ("number", "integer")
    for name in ("lower", "upper"):
        value = getattr(feature, name)
        if numeric and value is None:
            yield Problem(
                path=f"{path}.{name}",
                message="is missing",
                fix=f"write `{name}:` from what the field means, never from anybody's data",
            )
        elif not numeric and value is not None:
            yield Problem(path=f"{path}.{name}", message=f"a {feature.type} has no bounds", fix="remove it")
    if numeric and feature.lower is not None and feature.upper is not None and feature.lower >= feature.upper:
        yield Problem(
            path=f"{path}.lower",
            message=f"lower {feature.lower} is not below upper {feature.upper}",
            fix="swap the two, or widen the range",
        )
    if numeric and feature.transform == "log" and feature.lower is not None and feature.lower <= 0:
        yield Problem(
            path=f"{path}.lower",
            message=f"{feature.lower} has no logarithm",
            fix="give a small positive lower bound (values below it are clamped), or remove `transform: log`",
        )
    if not numeric and feature.transform != "none":
        yield Problem(path=f"{path}.transform", message=f"a {feature.type} has no transform", fix="remove it")
    if feature.type == "integer":
        for name in ("lower", "upper"):
            value = getattr(feature, name)
            if value is not None and value != value.to_integral_value():
                yield Problem(
                    path=f"{path}.{name}", message=f"{value} is not whole", fix="write a whole number"
                )
    if feature.type == "category":
        categories = feature.categories or ()
        if len(set(categories)) < len(categories) or len(categories) < 2:
            yield Problem(
                path=f"{path}.categories",
                message="needs at least two different values",
                fix="list every value the field may take, each once",
            )
    elif feature.categories is not None:
        yield Problem(path=f"{path}.categories", message=f"a {feature.type} has none", fix="remove it")


def _label(charter: Charter) -> Iterator[Problem]:
    label, task = charter.label, charter.task
    if task == "regression":
        if label.lower is None or label.upper is None:
            yield Problem(
                path="label",
                message="a regression needs label bounds",
                fix="add `lower:` and `upper:` by definition",
            )
        elif label.lower >= label.upper:
            yield Problem(
                path="label.lower", message="is not below upper", fix="swap the two, or widen the range"
            )
        if label.classes is not None:
            yield Problem(path="label.classes", message="a regression has no classes", fix="remove it")
        return
    if label.lower is not None or label.upper is not None:
        yield Problem(path="label.lower", message=f"a {task} label has no bounds", fix="remove them")
    classes = label.classes or ()
    wanted = len(classes) == 2 if task == "binary" else len(classes) >= 2
    if not wanted or len(set(classes)) < len(classes):
        count = "exactly two" if task == "binary" else "two or more"
        yield Problem(
            path="label.classes",
            message=f"{task} needs {count} different classes",
            fix="list them; for binary the second is the positive one",
        )


def _plan(charter: Charter) -> Iterator[Problem]:
    plan = charter.plan
    if plan.average_last is not None and plan.average_last > plan.rounds:
        yield Problem(
            path="plan.average_last",
            message=f"averages {plan.average_last} of {plan.rounds} rounds",
            fix=f"write at most {plan.rounds}",
        )
    if plan.minimum_sites is not None and plan.minimum_sites > len(charter.sites):
        yield Problem(
            path="plan.minimum_sites",
            message=f"is {plan.minimum_sites}, the charter has {len(charter.sites)} sites",
            fix=f"write at most {len(charter.sites)}",
        )


def _privacy(charter: Charter) -> Iterator[Problem]:
    privacy = charter.privacy
    yield from check_norm(privacy)
    if privacy.unit == "subject" and not privacy.subject_id:
        yield Problem(
            path="privacy.subject_id",
            message="unit: subject needs the column that says whose row it is",
            fix="name the column, or write unit: row",
        )
    if privacy.unit == "subject" and "max_rows_per_subject" not in privacy.model_fields_set:
        yield Problem(
            path="privacy.max_rows_per_subject",
            message="unit: subject needs a bound on the rows one subject may give",
            fix="write the number; rows beyond it are not used",
        )
    if privacy.max_rows_per_subject > 1 and privacy.sample_rate < 1:
        yield Problem(
            path="privacy.sample_rate",
            message="rows are sampled one by one, so a subject with several gains nothing from it",
            fix="write sample_rate: 1, or max_rows_per_subject: 1",
        )
    if privacy.max_rows_per_subject > 1 and privacy.sample_rate < 1:
        yield Problem(
            path="privacy.sample_rate",
            message="rows are sampled one by one, which protects no subject who has several",
            fix="write sample_rate: 1, or max_rows_per_subject: 1",
        )
    if privacy.unit != "subject" and (privacy.subject_id or privacy.max_rows_per_subject != 1):
        yield Problem(
            path="privacy.unit",
            message=f"reads {privacy.unit}, but subject_id or max_rows_per_subject is given",
            fix="write unit: subject, or remove both",
        )
    if privacy.subject_id and privacy.subject_id in {f.name for f in charter.features}:
        yield Problem(
            path="privacy.subject_id", message="is a feature", fix="a model must not learn from an identifier"
        )
    largest = max(site.nominal_rows for site in charter.sites)
    # a sum of n clipped gradients plus 64 standard deviations must fit in 63 bits, with room to spare
    units = 2.0**privacy.grid_bits
    reach = units * (4 * largest + 64 * float(privacy.noise_multiplier) * 2)
    if reach * charter.plan.local_steps >= 2.0**61:
        yield Problem(
            path="privacy.grid_bits",
            message=f"{privacy.grid_bits} bits overflow 64-bit integers at {largest} rows and this noise",
            fix="write a smaller grid_bits; 20 is plenty",
        )
    # above 2**32 grid units the sampler's 53-bit arithmetic would show; the sites refuse it (clients.dp)
    largest_noise = 2.0**32 / (2 if privacy.relation == "replace_one" else 1)
    if units * 1.01 * float(privacy.noise_multiplier) > largest_noise:
        yield Problem(
            path="privacy.grid_bits",
            message=f"{privacy.grid_bits} bits with this noise pass what sites can draw (2**32 grid units)",
            fix="write a smaller grid_bits; 20 is plenty",
        )


def _members(charter: Charter) -> Iterator[Problem]:
    groups = (
        ("sites", "identity", [(site.name, site.identity) for site in charter.sites]),
        ("officers", "key", [(officer.name, officer.key) for officer in charter.officers]),
    )
    for kind, key, members in groups:
        names: set[str] = set()
        keys: set[str] = set()
        for index, (name, value) in enumerate(members):
            if name in names:
                yield Problem(
                    path=f"{kind}[{index}].name", message=f"{name!r} occurs twice", fix="rename one"
                )
            if value in keys:
                yield Problem(
                    path=f"{kind}[{index}].{key}", message="is another member's key", fix="each has its own"
                )
            names.add(name)
            keys.add(value)
            try:
                parse_public_key(value)
            except AuditError:
                yield Problem(
                    path=f"{kind}[{index}].{key}",
                    message="is not a usable Ed25519 key",
                    fix="paste the line printed by `affidavit identity new`",
                )


def _gates(charter: Charter) -> Iterator[Problem]:
    for index, gate in enumerate(charter.gates):
        path = f"gates[{index}]"
        if gate.source == SOURCE:
            yield from check_private_gate(charter, index)
        elif gate.source != "public_set":
            yield Problem(
                path=f"{path}.source",
                message=f"{gate.source!r} cannot be recomputed by anybody else",
                fix="write source: public_set, or private_release with terms of evaluation",
            )
        elif charter.public_set is None:
            yield Problem(
                path=path, message="counts on a public set", fix="add `public_set:` with its digest and rows"
            )
        if gate.metric not in METRICS_OF_TASK[charter.task]:
            allowed = ", ".join(METRICS_OF_TASK[charter.task])
            yield Problem(
                path=f"{path}.metric",
                message=f"{gate.metric} does not fit a {charter.task} task",
                fix=f"use {allowed}",
            )
        if gate.floor is None and gate.margin_over_baseline is None:
            word = "ceiling" if gate.metric in LOWER_IS_BETTER else "floor"
            yield Problem(
                path=path,
                message="asks for nothing",
                fix=f"add `floor:` (the {word}) or `margin_over_baseline:`",
            )


def _model(charter: Charter) -> Iterator[Problem]:
    model = charter.model
    for name in ("hidden", "activation", "image", "channels", "layers"):
        if getattr(model, name) is not None and name not in _FAMILY_FIELDS[model.family]:
            yield Problem(path=f"model.{name}", message=f"does not belong to {model.family}", fix="remove it")
    for name in _REQUIRED.get(model.family, ()):
        if not getattr(model, name):
            yield Problem(
                path=f"model.{name}", message=f"{model.family} needs it", fix=f"add `{name}:` with a list"
            )
            return
    if model.family == "logistic_regression" and charter.task == "regression":
        yield Problem(path="model.family", message="a regression is not logistic", fix="write family: linear")
        return
    if model.family == "linear" and charter.task != "regression":
        yield Problem(
            path="model.family",
            message=f"a {charter.task} task is not linear",
            fix="write family: logistic_regression",
        )
        return
    listed = any(str(layer.get("layer")) == "site_intercept" for layer in model.layers or ())
    if model.family == "layers" and listed != model.site_intercept:
        yield Problem(
            path="model.site_intercept",
            message="and the layer list disagree about an intercept per site",
            fix="write true exactly when the list has a site_intercept layer",
        )
        return
    try:
        check_layers(
            charter.layers, width=charter.encoded_width, outputs=charter.outputs, sites=len(charter.sites)
        )
    except LayerError as error:
        where = (
            "model.layers"
            if model.family == "layers"
            else "model.image"
            if model.family == "cnn"
            else "model"
        )
        path = where if error.index is None or model.family != "layers" else f"{where}[{error.index}]"
        yield Problem(path=path, message=error.message, fix=error.fix)
