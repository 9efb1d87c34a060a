"""A population that served charters on different terms: nothing may quote the weaker relation's price."""

from __future__ import annotations

from decimal import Decimal

import pytest

from audit.entries import MechanismEvent
from audit.epsilon import EpsilonError, gaussian_epsilon, rdp_epsilon, recompute
from federation.accounting import LifetimeFilter, pld_epsilon
from federation.errors import AccountingError
from federation.mechanism import release_event

DELTA = 1e-5


def events(relation: str, noise: float, rate: float = 1, unit: str = "row") -> list[MechanismEvent]:
    one = release_event(
        noise_multiplier=noise,
        sample_rate=rate,
        local_steps=1,
        dimension=31,
        grid_bits=20,
        relation=relation,
        unit=unit,
    )
    return [one] * 30


@pytest.mark.parametrize("rate", [1, 0.25])
@pytest.mark.parametrize("relation", ["add_remove", "zero_out"])
def test_beside_replace_one_every_release_counts_with_two_rows(relation: str, rate: float) -> None:
    mixed = [*events(relation, 20, rate), *events("replace_one", 20, rate)]
    stated_strictly = [*events("replace_one", 10, rate), *events("replace_one", 20, rate)]
    assert recompute(mixed, DELTA).value >= recompute(stated_strictly, DELTA).value * (1 - 1e-9)
    assert rdp_epsilon(mixed, DELTA) >= rdp_epsilon(stated_strictly, DELTA) * (1 - 1e-9)
    assert recompute(mixed, DELTA).value >= pld_epsilon(mixed, DELTA, grid=1e-3) - 2e-3


def test_the_order_of_the_charters_makes_no_difference() -> None:
    first, second = events("add_remove", 20), events("replace_one", 20)
    assert gaussian_epsilon([*first, *second], DELTA) == gaussian_epsilon([*second, *first], DELTA)


def test_the_hard_stop_counts_with_the_strictest_relation() -> None:
    spent, planned = events("replace_one", 20), events("add_remove", 20)
    strict = recompute([*events("replace_one", 10), *spent], DELTA).value
    cap = LifetimeFilter(epsilon=Decimal(strict * 0.99), delta=Decimal("0.00001"))
    assert cap.admits(spent, events("replace_one", 20))
    assert not cap.admits(spent, planned)


def test_rows_and_subjects_are_never_added_up() -> None:
    mixed = [*events("add_remove", 20), *events("add_remove", 20, unit="subject")]
    with pytest.raises(EpsilonError, match="do not compose"):
        recompute(mixed, DELTA)
    with pytest.raises(EpsilonError, match="do not compose"):
        rdp_epsilon(mixed, DELTA)
    with pytest.raises(AccountingError, match="do not compose"):
        LifetimeFilter(epsilon=Decimal(8), delta=Decimal("0.00001")).admits(mixed[:30], mixed[30:])
