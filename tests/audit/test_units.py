"""What a release counts for a row and for a site, and how the two stand in one ledger."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.entries import MechanismEvent
from audit.epsilon import EpsilonError, recompute, whole_site_epsilon
from audit.shared_noise import SharedNoiseError, site_level
from audit.units import counted_for, of_people, row_level

ROW = MechanismEvent(
    mechanism="discrete_gaussian",
    sampling="full",
    sample_rate="1",
    steps=1,
    sigma_grid=8_000_000,
    sensitivity_grid=1_048_600,
    dimension=30,
    grid_bits=20,
    relation="add_remove",
    unit="row",
)
SITE = replace(ROW, unit="site", relation="zero_out")
REPLACED = replace(ROW, unit="site", relation="replace_one", sensitivity_grid=2 * ROW.sensitivity_grid)
BOTH = replace(ROW, site_sensitivity_grid=4_000_000)


def cost(*events: MechanismEvent) -> float:
    return recompute(events, 1e-5).value


def test_a_row_of_a_site_is_two_lengths_from_any_other() -> None:
    """Zeroing a site out says less than what a changed row needs: its updates before and after differ."""
    assert row_level(SITE).sensitivity_grid == 2 * SITE.sensitivity_grid
    assert row_level(REPLACED).sensitivity_grid == REPLACED.sensitivity_grid
    assert {row_level(event).relation for event in (SITE, REPLACED)} == {"replace_one"}
    assert row_level(SITE, "subject").unit == "subject"
    assert row_level(ROW) == ROW


@given(st.integers(1, 2**40), st.sampled_from(["zero_out", "replace_one"]))
def test_a_row_is_never_said_to_pay_less_than_its_site(sensitivity: int, relation: str) -> None:
    event = replace(SITE, relation=relation, sensitivity_grid=sensitivity, sigma_grid=3 * sensitivity + 8)
    assert cost(row_level(event)) >= cost(event) * (1 - 1e-9)


def test_a_site_that_is_the_unit_counts_as_a_whole_site_by_its_one_length() -> None:
    assert site_level(SITE) == SITE
    assert site_level(REPLACED).sensitivity_grid == SITE.sensitivity_grid
    assert site_level(replace(REPLACED, sensitivity_grid=7)).sensitivity_grid == 4  # rounded up, never down
    assert whole_site_epsilon([SITE, BOTH], 1e-5) < math.inf
    assert whole_site_epsilon([SITE, ROW], 1e-5) == math.inf
    with pytest.raises(SharedNoiseError):
        site_level(ROW)


def test_one_ledger_counts_both_levels_and_neither_is_hidden() -> None:
    together = of_people([ROW, SITE])
    assert {event.unit for event in together} == {"row"}
    assert cost(*together) > max(cost(ROW), cost(row_level(SITE)))
    subject = replace(ROW, unit="subject")
    assert {event.unit for event in of_people([subject, SITE])} == {"subject"}
    assert counted_for([BOTH, SITE], "site") == [site_level(BOTH), SITE]
    assert counted_for([ROW, SITE], "site") is None
    assert counted_for([ROW, SITE], "row") == [ROW, row_level(SITE)]
    assert of_people([]) == counted_for([], "site") == []


def test_rows_and_subjects_still_do_not_compose() -> None:
    mixed = of_people([ROW, replace(ROW, unit="subject"), SITE])
    with pytest.raises(EpsilonError, match="do not compose"):
        cost(*mixed)


def test_a_site_and_a_row_are_not_added_up_as_they_stand() -> None:
    with pytest.raises(EpsilonError, match="do not compose"):
        cost(ROW, SITE)
