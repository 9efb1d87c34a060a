"""A site's rules: what they break on, and what a wrong site.yaml is told."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import yaml

from clients.errors import HomeError
from clients.home import SiteHome
from clients.rules import Hours, Rules, RunFacts, breaches

NOON = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)  # a Tuesday


def facts(**changes):
    given = {
        "purposes": ("research",),
        "model": "sepsis",
        "sites": 4,
        "run_epsilon": 1.0,
        "year_epsilon": 3.0,
        "moment": NOON,
    }
    return RunFacts(**(given | changes))


def rules(**given):
    return Rules.model_validate({"auto_approve": False} | given)


def broken(rules, facts):
    return [(breach.rule, breach.code) for breach in breaches(rules, facts)]


def test_no_rules_break_on_nothing():
    assert broken(rules(), facts()) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"purposes": ["billing"]}, ("purposes", "purpose_not_allowed")),
        ({"models": ["stroke"]}, ("models", "model_not_allowed")),
        ({"epsilon_per_run": "0.999"}, ("epsilon_per_run", "budget_exhausted")),
        ({"epsilon_per_year": 2.5}, ("epsilon_per_year", "budget_exhausted")),
        ({"minimum_sites": 5}, ("minimum_sites", "participants_not_allowed")),
        ({"hours": {"from": "13:00", "to": "18:00"}}, ("hours", "site_closed")),
        ({"hours": {"from": "08:00", "to": "18:00", "days": ["sat", "sun"]}}, ("hours", "site_closed")),
        ({"hours": {"from": "08:00", "to": "12:00"}}, ("hours", "site_closed")),
    ],
)
def test_a_run_beyond_a_rule_breaks_that_rule_alone(given, expected):
    assert broken(rules(**given), facts()) == [expected]


@pytest.mark.parametrize(
    "given",
    [
        {"purposes": ["research", "billing"]},
        {"models": ["sepsis"]},
        {"epsilon_per_run": 1},
        {"epsilon_per_year": "3"},
        {"minimum_sites": 4},
        {"hours": {"from": "12:00", "to": "12:01"}},
        {"hours": {"from": "22:00", "to": "12:30", "days": ["mon"]}},  # since Monday night
        {"hours": {"from": "13:00", "to": "14:00", "zone": "Europe/Berlin"}},
    ],
)
def test_a_run_exactly_within_a_rule_passes(given):
    assert broken(rules(**given), facts()) == []


def test_a_cost_that_is_no_number_never_passes():
    assert broken(rules(epsilon_per_run="5"), facts(run_epsilon=float("nan")))
    assert broken(rules(epsilon_per_run="5"), facts(run_epsilon=float("inf")))


def test_hours_over_midnight_belong_to_the_day_they_began():
    night = Hours.model_validate({"from": "22:00", "to": "06:00", "days": ["fri"]})
    friday, saturday = datetime(2026, 11, 27, 23, tzinfo=UTC), datetime(2026, 11, 28, 5, 59, tzinfo=UTC)
    assert night.include(friday)
    assert night.include(saturday)
    assert not night.include(datetime(2026, 11, 28, 6, 0, tzinfo=UTC))
    assert not night.include(datetime(2026, 11, 28, 23, tzinfo=UTC))
    assert not night.include(datetime(2026, 11, 27, 5, tzinfo=UTC))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("epsilon_per_runs", "1", "rules.epsilon_per_runs"),
        ("epsilon_per_run", "-1", "rules.epsilon_per_run"),
        ("epsilon_per_year", "plenty", "rules.epsilon_per_year"),
        ("epsilon_per_run", True, "rules.epsilon_per_run"),
        ("minimum_sites", "four", "rules.minimum_sites"),
        ("minimum_sites", True, "rules.minimum_sites"),
        ("ask", ["everything"], "rules.ask.0"),
        ("ask", "runs", "rules.ask"),
        ("hours", {"from": 480, "to": "18:00"}, "in quotes"),
        ("hours", {"from": "8:00", "to": "18:00"}, "rules.hours.from"),
        ("hours", {"from": "08:00", "to": "08:00"}, "leave hours out"),
        ("hours", {"from": "08:00", "to": "18:00", "zone": "Mars/Olympus"}, "Mars/Olympus"),
        ("hours", {"from": "08:00", "to": "18:00", "days": []}, "rules.hours.days"),
        ("hours", {"from": "08:00", "to": "18:00", "until": "x"}, "rules.hours.until"),
        ("approved_bundles", ["abc"], "rules.approved_bundles.0"),
    ],
)
def test_a_wrong_rule_is_named_with_its_key(tmp_path, key, value, told):
    home = a_home(tmp_path)
    document = yaml.safe_load((home.path / "site.yaml").read_text())
    document["rules"][key] = value
    (home.path / "site.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(HomeError) as error:
        SiteHome.open(home.path)
    assert told in str(error.value)
    assert "; " in str(error.value)  # a problem, and a fix


def test_rules_survive_an_approval(tmp_path):
    home = a_home(tmp_path)
    document = yaml.safe_load((home.path / "site.yaml").read_text())
    document["rules"] |= {
        "hours": {"from": "08:00", "to": "18:00", "zone": "Europe/Berlin"},
        "epsilon_per_run": "0.5",
        "ask": ["runs"],
    }
    document["relay_uids"] = [1001]
    (home.path / "site.yaml").write_text(yaml.safe_dump(document))
    before = SiteHome.open(home.path).config
    SiteHome.open(home.path).approve("1" * 64)
    after = SiteHome.open(home.path).config
    assert after.rules.approved_charters == ("1" * 64,)
    assert after.rules.model_copy(update={"approved_charters": ()}) == before.rules
    assert after.relay_uids == (1001,)


def a_home(folder):
    return SiteHome.create(
        folder / "site",
        name="ward",
        data=folder / "rows.csv",
        population="people",
        lifetime_epsilon="5",
        lifetime_delta="0.00001",
        auto_approve=False,
    )
