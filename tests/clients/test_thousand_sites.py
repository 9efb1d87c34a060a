"""What a version costs each of many hundreds of sites fits into its entry, and is proved like any other."""

from __future__ import annotations

import base64
import secrets
import zlib

import pytest

from audit.bodies import GateResult, VersionRegistered
from audit.cost_bodies import SiteEpsilon, pack_costs
from audit.entries import decode_entry, encode_entry, new_entry
from audit.packing import PackingError
from audit.verify import verify_evidence
from clients.simulation import simulate
from tests.clients.test_virtual import CHARTER, GATES, frame


def costs(count, *, alike=False):
    """Costs of `count` sites; unless `alike`, every number is another, as after years of different runs."""
    return tuple(
        SiteEpsilon(
            site=f"hospital-{i:04d}",
            population=secrets.token_hex(16),
            events=1 if alike else i,
            run_epsilon="1.25" if alike else f"{1 + secrets.randbelow(10**9) / 10**9:.6f}",
            run_epsilon_rdp="1.5" if alike else f"{2 + secrets.randbelow(10**9) / 10**9:.6f}",
            lifetime_epsilon="1.25" if alike else f"{3 + secrets.randbelow(10**9) / 10**9:.6f}",
            delta="0.00001",
            accountant="pld",
            relation="add_remove",
            unit="row",
        )
        for i in range(count)
    )


def version(plain=(), packed=""):
    gate = GateResult(
        metric="auc", source="public_set", dataset="a" * 64, floor="0.7", baseline="0.5", value="0.9",
        passed=1,
    )  # fmt: skip
    return VersionRegistered(
        version="a" * 64, model="m" * 60, charter="b" * 64, run="c" * 32, author="ed25519:" + "A" * 44,
        averaged_from=1, averaged_to=1, gates=(gate,) * 8, epsilons=plain, packed=packed,
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 4, 120])
def test_costs_of_few_sites_stand_as_they_are(count):
    few = costs(count)
    assert pack_costs(few) == (few, "")


@pytest.mark.parametrize("count", [300, 1024])
def test_costs_of_many_sites_fit_into_one_entry_whatever_their_numbers(count):
    many = costs(count)
    body = version(*pack_costs(many))
    assert body.epsilons == ()
    leaf = encode_entry(new_entry(body, actor="coordinator", time="2026-11-30T00:00:00Z"))
    assert decode_entry(leaf).body.costs == many


def pack(text):
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def texts():
    from audit.cost_bodies import _costs_text

    many = costs(400, alike=True)
    right = _costs_text(many)
    return {
        "plain beside packed": (many[:1], pack(right)),
        "no base64": ((), "§"),
        "no JSON": ((), pack(right[:-1] + " " * 50_000)),
        "another form": ((), pack(right.replace(",", ", "))),
        "a number for a text": ((), pack(right.replace('"unit":"row"', '"unit":1'))),
        "a field too many": ((), pack(right.replace('"unit":"row"', '"unit":"row","also":"this"'))),
        "a field too few": ((), pack(right.replace('"unit":"row",', "").replace(',"unit":"row"', ""))),
        "no list": ((), pack('{"a":' + right + "}")),
        "deep": ((), pack("[" * 60_000 + "]" * 60_000)),
        "few, so not to be packed": ((), pack(_costs_text(many[:3]))),
        "a bomb": ((), pack("[" + " " * (2 << 20) + "]")),
    }


@pytest.mark.parametrize("name", sorted(texts()))
def test_packed_costs_in_any_other_form_are_refused(name):
    with pytest.raises(PackingError):
        version(*texts()[name])


@pytest.mark.soak
def test_a_thousand_sites_are_verified_from_a_file():
    sites = {f"s{i:04d}": frame(12, i) for i in range(1000)}
    text = CHARTER.replace("rounds: 3", "rounds: 2") + GATES
    run = simulate(text, sites, public=frame(60, 10_000), homes="memory")
    try:
        run.register()
        run.approve()
        assert run.version.registered.epsilons == ()
        assert [cost.site for cost in run.version.registered.costs] == sorted(sites)
        report = verify_evidence(run.evidence(), policy_text=run.policy)
        weak = [(s.title, s.word, s.detail) for s in report.steps if s.word in ("FAIL", "NO EVIDENCE")]
        assert (report.verdict, weak) == ("VALID", [])
    finally:
        run.close()
