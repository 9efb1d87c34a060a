"""A site's own use cases: following the log over HTTP, reviewing a charter, homes and keys."""

from __future__ import annotations

import base64
import json
import stat

import httpx
import pytest

from audit.canonical import canonical_bytes
from audit.checkpoints import open_checkpoint
from audit.entries import TYPE_OF, SiteStatement
from audit.errors import WitnessError
from audit.keys import SigningKey, VerifyKey, parse_public_key
from audit.misbehaviour import Misbehaviour
from audit.notes import KeyType, NoteSigner, NoteVerifier
from clients.agent import Agent
from clients.errors import DataFileError, HomeError, IdentityError, LedgerBehindError, LinkError, RefusedError
from clients.home import SiteHome
from clients.identity import Identity, SiteKeys
from clients.service import (
    AddSiteRequest,
    add_site,
    approve_charter,
    check_against_log,
    review,
    status,
    witness_once,
)
from federation.trust import federation_policy


class LogOverHttp:
    """The three routes a witness needs, over a real ledger; `lie` may change any answer."""

    def __init__(self, coordinator, lie=None):
        self.coordinator, self.lie, self.posted = coordinator, lie, []
        self.note = coordinator.publish()

    def __call__(self, request):
        ledger, path, query = self.coordinator.ledger, request.url.path, request.url.params
        if path == "/v1/audit/checkpoint":
            content = self.note
        elif path == "/v1/audit/consistency":
            proof = ledger.consistency_proof(int(query["old"]), int(query["new"]))
            content = json.dumps({"proof": [base64.b64encode(item).decode() for item in proof]}).encode()
        elif path == "/v1/audit/entries":
            rows = ledger.search(type=query["type"], site=query["site"], after=int(query["after"]), limit=500)
            listed = [{"leaf_index": row.leaf_index, "entry": json.loads(row.body)} for row in rows]
            content = json.dumps({"entries": listed, "next": None}).encode()
        elif request.method == "GET":
            return httpx.Response(404)
        else:
            self.posted.append(json.loads(request.content))
            content = b"{}"
        return httpx.Response(200, content=self.lie(path, content) if self.lie else content)

    def client(self):
        return httpx.Client(transport=httpx.MockTransport(self))


def test_a_site_follows_the_log_and_posts_its_cosignature(network):
    log = LogOverHttp(network.coordinator)
    home = network.agents["alpha"].home
    assert witness_once(home, "http://log/", client=log.client()) == network.coordinator.ledger.tree_size
    network.coordinator.append(home.keys().enrolment("alpha", "p" * 32, "log.example/small"), "coordinator")
    log.note = network.coordinator.publish()
    witness_once(home, "http://log", client=log.client())
    posted = log.posted[-1]
    key = NoteVerifier.parse(home.keys().witness_signer("alpha").vkey)
    note = log.note + posted["note_signature"].encode()
    opened = open_checkpoint(
        note, log=NoteVerifier.parse(network.coordinator.log_key), witnesses=[key], now=2_000_000_000
    )
    assert [c.name for c in opened.cosignatures] == ["alpha"]
    assert posted["site"] == "alpha"
    assert status(_closed(network, "alpha")).witnessed_size == network.coordinator.ledger.tree_size


def _closed(network, site):
    network.agents[site].close()
    return network.agents[site].home


def test_a_log_that_shrank_or_changed_is_not_cosigned(network, tmp_path):
    home = network.agents["alpha"].home
    witness_once(home, "http://log", client=LogOverHttp(network.coordinator).client())
    before = home.witness_path.read_bytes()

    def other_proof(path, content):
        return b'{"proof":["%s"]}' % base64.b64encode(bytes(32)) if "consistency" in path else content

    network.coordinator.append(home.keys().enrolment("alpha", "q" * 32, "log.example/small"), "coordinator")
    log = LogOverHttp(network.coordinator, lie=other_proof)
    with pytest.raises(WitnessError) as caught:
        witness_once(home, "http://log", client=log.client())
    assert log.posted == []
    assert home.witness_path.read_bytes() == before
    (kept,) = (home.path / "misbehaviour").iterdir()
    assert str(kept) in caught.value.__notes__[0]
    assert Misbehaviour.parse(kept.read_bytes()).kind == "unproved", "an invented proof convicts nobody"


def test_sites_under_one_operator_have_one_voice():
    keys = {
        name: NoteSigner(name, SigningKey.generate(), KeyType.COSIGNATURE).vkey
        for name in ("east", "north", "south", "west")
    }
    log = NoteSigner("a.example/log", SigningKey.generate()).vkey
    policy = federation_policy(log, keys, operators={"east": "trust-a", "north": "trust-a"})
    assert policy.evaluate(["east", "north"]).satisfied is False
    assert policy.evaluate(["east", "north", "south"]).have == policy.evaluate(["east", "south"]).have == 2
    assert policy.evaluate(["east", "south"]).satisfied
    assert federation_policy(log, keys).evaluate(["east", "north", "south"]).satisfied


@pytest.mark.parametrize("junk", [b"", b"hello", b"\xff\xfe", b"{}", b'{"proof":"x"}', b'{"proof":[1]}'])
def test_a_server_that_is_no_log_is_said_to_be_none(network, junk):
    home = network.agents["alpha"].home
    witness_once(home, "http://log", client=LogOverHttp(network.coordinator).client())
    network.coordinator.append(home.keys().enrolment("alpha", "q" * 32, "log.example/small"), "coordinator")
    for part in ("checkpoint", "consistency"):
        log = LogOverHttp(
            network.coordinator, lie=lambda path, content, part=part: junk if part in path else content
        )
        with pytest.raises((LinkError, WitnessError)):
            witness_once(home, "http://log", client=log.client())
        assert log.posted == []


def test_a_server_that_fails_is_no_crash(network):
    client = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(500)))
    with pytest.raises(LinkError, match="does not answer"):
        witness_once(network.agents["alpha"].home, "http://log", client=client)


def test_an_agent_compares_its_ledger_with_the_log_before_it_serves(network):
    network.start()
    network.play(1)
    log = LogOverHttp(network.coordinator)
    assert check_against_log(network.agents["alpha"], "http://log", client=log.client()) == 1


def test_an_agent_whose_ledger_is_behind_the_log_does_not_start(network, tmp_path):
    import shutil

    network.start()
    network.agents["alpha"].close()
    shutil.copytree(network.folder / "sites" / "alpha", tmp_path / "old")
    network.restart("alpha")
    network.play(1)
    rewound = Agent.open(tmp_path / "old")
    log = LogOverHttp(network.coordinator)
    with pytest.raises(LedgerBehindError, match="an old copy was put back"):
        check_against_log(rewound, "http://log", client=log.client())
    answer, _ = rewound.handle("run.propose", canonical_bytes(_proposal(network)), {})
    assert json.loads(answer)["refusal"]["reason"] == "ledger_behind_log"
    rewound.close()


def _proposal(network):
    network.run = "run-2"
    return {"run_started": network.run_started(), "charter": network.text()}


def test_a_review_says_cost_and_problems_and_signs_nothing(network):
    home = network.agents["alpha"].home
    network.agents["alpha"].close()
    home.config.data.write_text("age,dose,arm,outcome\n500,1,drug,yes\n5,1,drug,no\n", encoding="utf-8")
    found = review(home, network.text())
    assert (found.releases, found.fits) == (3, True)
    assert 0 < found.charter_epsilon == pytest.approx(found.lifetime_after)
    assert [(p.row, p.column) for p in found.problems] == [(1, "age")]
    assert SiteHome.open(home.path).config.rules.approved_charters == ()


def test_approving_a_charter_that_does_not_name_the_site_is_refused(network):
    with pytest.raises(RefusedError, match="no member"):
        approve_charter(network.agents["alpha"].home, network.text().replace('"alpha"', '"aleph"'))


def test_approvals_add_up_whoever_holds_an_old_copy_of_the_home(network):
    home = network.agents["alpha"].home
    home.approve("1" * 64)
    home.approve("2" * 64)
    assert SiteHome.open(home.path).config.rules.approved_charters == ("1" * 64, "2" * 64)


@pytest.fixture
def request_for(tmp_path):
    def make(**changes):
        data = tmp_path / "rows.csv"
        data.write_text("age,outcome\n1,yes\n", encoding="utf-8")
        fields = {
            "home": tmp_path / "site",
            "name": "ward",
            "data": data,
            "population": "people of ward 7",
            "lifetime_epsilon": "10",
            "lifetime_delta": "1e-5",
        }
        return AddSiteRequest(**{**fields, **changes})

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Ward 7"}, "name"),
        ({"name": "../up"}, "name"),
        ({"lifetime_epsilon": "-1"}, "lifetime.epsilon"),
        ({"lifetime_epsilon": "lots"}, "lifetime.epsilon"),
        ({"lifetime_delta": "0.5"}, "lifetime.delta"),
        ({"population": ""}, "population.name"),
    ],
)
def test_a_site_with_a_bad_setting_is_not_made(request_for, changes, message):
    with pytest.raises(HomeError, match=message):
        add_site(request_for(**changes))
    assert not (request_for().home / "keys").exists()


def test_a_site_without_its_file_is_not_made(request_for, tmp_path):
    with pytest.raises(DataFileError, match="does not exist"):
        add_site(request_for(data=tmp_path / "gone.csv"))


def test_a_site_is_made_once_and_keeps_its_pseudonym(request_for):
    home = add_site(request_for())
    with pytest.raises(HomeError, match="home already"):
        add_site(request_for())
    assert SiteHome.open(home.path).config == home.config
    assert stat.S_IMODE((home.path / "keys").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("auto_approve", "auto_aprove"),
        lambda text: text.replace("epsilon", "epsilom"),
        lambda text: text + "\n\t: [",
        lambda text: "",
        lambda text: text.replace("name: ward", "name: WARD"),
    ],
)
def test_a_damaged_site_file_is_named_by_its_key(request_for, damage):
    home = add_site(request_for())
    path = home.path / "site.yaml"
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(HomeError, match=r"site\.yaml"):
        SiteHome.open(home.path)


def test_an_agent_needs_a_policy_and_its_keys(request_for):
    home = add_site(request_for())
    with pytest.raises(HomeError, match="policy"):
        Agent.open(home)
    (home.path / "keys" / "statement.pem").unlink()
    with pytest.raises(IdentityError):
        SiteKeys.open(home.path / "keys")


def test_a_site_follows_one_log(request_for, network):
    home = add_site(request_for())
    ours = federation_policy(network.coordinator.log_key, {"ward": home.keys().witness_signer("ward").vkey})
    home.join(ours)

    other = federation_policy(
        NoteSigner("other.example/log", SigningKey.generate()).vkey,
        {"ward": home.keys().witness_signer("ward").vkey},
    )
    with pytest.raises(HomeError, match="another log"):
        home.join(other)


@pytest.mark.parametrize(("sites", "need"), [(1, 1), (2, 2), (3, 2), (4, 3), (7, 5), (10, 7)])
def test_a_policy_needs_more_than_half_of_the_honest(network, sites, need):

    keys = {
        f"s{n}": NoteSigner(f"s{n}", SigningKey.generate(), KeyType.COSIGNATURE).vkey for n in range(sites)
    }
    policy = federation_policy(network.coordinator.log_key, keys)
    assert policy.groups[0].need == need
    assert 2 * need > sites + (sites - 1) // 3


def test_an_enrolment_is_signed_by_all_three_keys(network):
    from audit.entries import decode_signature, signing_payload

    home = network.agents["alpha"].home
    body = home.keys().enrolment("alpha", home.config.population.pseudonym, "log.example/small")
    domain, payload = signing_payload(body)
    for key, proof in (
        (VerifyKey(parse_public_key(body.identity_key)), body.signature),
        (VerifyKey(parse_public_key(body.statement_key)), body.statement_proof),
        (NoteVerifier.parse(body.witness_key).key, body.witness_proof),
    ):
        key.verify(domain, payload, decode_signature(proof))
    assert len({body.identity_key, body.statement_key, body.agreement_key}) == 3


def test_an_identity_is_made_once(tmp_path):
    made = Identity.create(tmp_path, b"secret")
    with pytest.raises(IdentityError):
        Identity.create(tmp_path)
    with pytest.raises(IdentityError):
        Identity.open(tmp_path, b"wrong")
    assert Identity.open(tmp_path, b"secret").public == made.public
    assert TYPE_OF[SiteStatement] == "site.statement"
