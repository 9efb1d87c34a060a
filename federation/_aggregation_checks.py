"""What a charter says about combining updates and about training that differs from site to site."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from audit.errors import AuditError
from audit.layers import check_local_layers
from audit.robust import RuleError, check_rule
from federation.errors import Problem

if TYPE_CHECKING:
    from federation.charter import Charter


def check_aggregation(charter: Charter) -> Iterator[Problem]:
    """Yield what the rule contradicts: the number of sites, or secure aggregation."""
    part = charter.aggregation
    if part is None:
        return
    if charter.secure_aggregation is not None:
        for name, asked in (("rule", part.rule != "mean"), ("norm_bound", part.norm_bound)):
            if asked:
                yield Problem(
                    path=f"aggregation.{name}",
                    message="needs each site's update; secure_aggregation shows their sum alone",
                    fix="remove `secure_aggregation`, or write aggregation: {rule: mean, norm_bound: false}",
                )
    try:
        check_rule(charter.rule, charter.minimum_sites)
    except RuleError as error:
        yield Problem(
            path=f"aggregation.{error.field}",
            message=error.problem,
            fix="write fewer lying sites, another rule, or a larger plan.minimum_sites",
        )


def check_local_training(charter: Charter) -> Iterator[Problem]:
    """Yield what is wrong with local layers and with the pull towards the round's model."""
    plan, local = charter.plan, charter.model.local_layers
    if local:
        try:
            check_local_layers(charter.layers, local)
        except AuditError as error:
            yield Problem(
                path="model.local_layers",
                message=str(error),
                fix="list layers by their place in the model, from 0, ascending, and leave some shared",
            )
    if plan.proximal and plan.local_steps == 1:
        yield Problem(
            path="plan.proximal",
            message="pulls local steps towards the round's model, and the plan has a single one",
            fix="write local_steps above 1, or remove it",
        )
    if plan.proximal * plan.local_learning_rate > 1:
        yield Problem(
            path="plan.proximal",
            message=f"{plan.proximal} times the local learning rate is above 1, so steps would overshoot",
            fix=f"write at most {1 / plan.local_learning_rate:.6g}",
        )
