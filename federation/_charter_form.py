"""The two written forms of a charter: the canonical JSON that is signed, and YAML for people."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

import yaml

from audit.decimals import decimal_text, parse_decimal
from federation._charter_serving import serving_document, serving_fields

if TYPE_CHECKING:
    from federation.charter import Charter, Feature


def canonical_document(charter: Charter) -> dict[str, Any]:
    """Return the canonical form: strings, counts, lists and objects, nothing optional left implicit."""
    plan, privacy = charter.plan, charter.privacy
    document: dict[str, Any] = {
        "affidavit": 1,
        "name": charter.name,
        "task": charter.task,
        "features": [_feature(feature) for feature in charter.features],
        "label": _label(charter),
        "model": {
            "family": charter.model.family,
            "site_intercept": int(charter.model.site_intercept),
            "layers": [dict(layer) for layer in charter.layers],
        },
        "plan": {
            "strategy": plan.strategy,
            "rounds": plan.rounds,
            "local_steps": plan.local_steps,
            "learning_rate": decimal_text(plan.learning_rate),
            "local_learning_rate": decimal_text(plan.local_learning_rate),
            "average_last": charter.average_last,
            "beta1": decimal_text(plan.beta1),
            "beta2": decimal_text(plan.beta2),
            "tau": decimal_text(plan.tau),
            "round_timeout_s": plan.round_timeout_s,
            "minimum_sites": charter.minimum_sites,
        },
        "privacy": {
            "unit": privacy.unit,
            "relation": privacy.relation,
            "epsilon": decimal_text(privacy.epsilon),
            "delta": decimal_text(privacy.delta),
            "sample_rate": decimal_text(privacy.sample_rate),
            "max_update_norm" if privacy.by_site else "max_grad_norm": decimal_text(privacy.norm),
            "noise_multiplier": decimal_text(privacy.noise_multiplier),
            "accountant": privacy.accountant,
            "grid_bits": privacy.grid_bits,
            "precision": privacy.precision,
            "subject_id": privacy.subject_id,
            "max_rows_per_subject": privacy.max_rows_per_subject,
        },
        "sites": [
            {
                "name": site.name,
                "identity": site.identity,
                "nominal_rows": site.nominal_rows,
                "weight": decimal_text(site.nominal_rows if site.weight is None else site.weight),
            }
            for site in charter.sites
        ],
        "gates": [_gate(gate) for gate in charter.gates],
        "purposes": list(charter.purposes),
        "officers": [{"name": officer.name, "key": officer.key} for officer in charter.officers],
    }
    if plan.spare_rounds:
        document["plan"]["spare_rounds"] = plan.spare_rounds
    if plan.proximal:
        document["plan"]["proximal"] = decimal_text(plan.proximal)
    if charter.model.local_layers:
        document["model"]["local_layers"] = list(charter.model.local_layers)
    if charter.evaluation is not None:
        document["evaluation"] = {
            "share": decimal_text(charter.evaluation.share),
            "noise_multiplier": decimal_text(charter.evaluation.noise_multiplier),
        }
    if charter.aggregation is not None:
        rule = charter.rule
        document["aggregation"] = {
            "rule": rule.name,
            "byzantine": rule.byzantine,
            "keep": rule.keep,
            "norm_bound": int(rule.norm_bound),
        }
    document |= serving_document(charter)
    if charter.secure_aggregation is not None:
        document["secure_aggregation"] = {"tolerated": charter.secure_aggregation.tolerated}
    if charter.site_level is not None:
        document["site_level"] = {
            "max_update_norm": decimal_text(charter.site_level.max_update_norm),
            "epsilon": decimal_text(charter.site_level.epsilon),
        }
    if charter.public_set is not None:
        document["public_set"] = {"digest": charter.public_set.digest, "rows": charter.public_set.rows}
    if charter.decisions == "legal_effect":
        document["decisions"] = charter.decisions
    if charter.legal_basis is not None:
        document["legal_basis"] = charter.legal_basis
    if charter.regions:
        document["regions"] = list(charter.regions)
    if charter.max_age_days is not None:
        document["max_age_days"] = charter.max_age_days
    return document


def _feature(feature: Feature) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": feature.name,
        "type": feature.type,
        "unit": feature.unit,
        "missing": feature.missing,
    }
    if feature.type == "category":
        document["categories"] = list(feature.categories or ())
    elif feature.type != "boolean":
        document["lower"] = _decimal(feature.lower)
        document["upper"] = _decimal(feature.upper)
        document["transform"] = feature.transform
    return document


def _label(charter: Charter) -> dict[str, Any]:
    label = charter.label
    if charter.task == "regression":
        return {"name": label.name, "lower": _decimal(label.lower), "upper": _decimal(label.upper)}
    return {"name": label.name, "classes": list(label.classes or ())}


def _gate(gate: Any) -> dict[str, Any]:
    document: dict[str, Any] = {"metric": gate.metric, "source": gate.source}
    for name in ("floor", "margin_over_baseline"):
        value = getattr(gate, name)
        if value is not None:
            document[name] = decimal_text(value)
    return document


def _decimal(value: Decimal | None) -> str:
    return decimal_text(value if value is not None else 0)


_DECIMALS = frozenset(
    [
        "lower",
        "upper",
        "learning_rate",
        "local_learning_rate",
        "beta1",
        "beta2",
        "tau",
        "proximal",
        "share",
        "epsilon",
        "delta",
        "sample_rate",
        "max_grad_norm",
        "max_update_norm",
        "noise_multiplier",
        "weight",
        "floor",
        "margin_over_baseline",
    ]
)


def fields_of_canonical(document: dict[str, Any]) -> dict[str, Any]:
    """Return what a `Charter` is built from, given its canonical JSON values."""
    fields: dict[str, Any] = _decimals(document, "")
    fields["model"] = _model_fields(document["model"])
    serving_fields(fields)
    return fields


def _decimals(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _decimals(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_decimals(item, key) for item in value]
    if isinstance(value, str) and key in _DECIMALS:
        return parse_decimal(value)
    return value


def _model_fields(model: dict[str, Any]) -> dict[str, Any]:
    family, layers = model["family"], model["layers"]
    fields: dict[str, Any] = {"family": family, "site_intercept": bool(model["site_intercept"])}
    activations = [
        layer["layer"] for layer in layers if layer["layer"] in ("relu", "tanh", "sigmoid", "gelu")
    ]
    if family == "layers":
        fields["layers"] = layers
    fields["local_layers"] = model.get("local_layers", ())
    if family in ("mlp", "cnn") and activations:
        fields["activation"] = activations[0]
    if family == "mlp":
        fields["hidden"] = [layer["out"] for layer in layers if layer["layer"] == "linear"][:-1]
    if family == "cnn":
        fields["image"] = layers[0].get("shape")
        fields["channels"] = [layer["out"] for layer in layers if layer["layer"] == "conv2d"]
    return fields


class _Dumper(yaml.SafeDumper):
    """Never writes the anchors that our own parser refuses."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_decimal(dumper: yaml.SafeDumper, value: Decimal) -> yaml.Node:
    text = decimal_text(value)
    return dumper.represent_scalar(
        "tag:yaml.org,2002:float" if "." in text else "tag:yaml.org,2002:int", text
    )


_Dumper.add_representer(Decimal, _represent_decimal)


def yaml_text(charter: Charter) -> str:
    """Return YAML that reads back to the same charter."""
    return dump_yaml(charter.model_dump(mode="python", exclude_none=True))


def dump_yaml(document: dict[str, Any]) -> str:
    """Write plain values (with `Decimal` numbers) in the order given, short mappings on one line."""
    return yaml.dump(
        _lists(document),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=110,
        default_flow_style=None,
    )


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_lists(item) for item in value]
    return value
