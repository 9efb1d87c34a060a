"""A coordinator of masked rounds by hand: it keeps all it sees, and what each site really released."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from audit.entries import SiteStatement, body_document, parse_body
from audit.keys import SigningKey
from audit.secure_bodies import MaskKeys, SharesOpened, SurvivorsAgreed
from audit.secure_round import RoundName, Transcript, open_sum
from audit.weights import decode_update
from clients.agent import Agent
from federation.charter import Charter
from tests.clients.conftest import SITES, Network, call, charter_text

Answer = dict[str, Any]


def masked_charter(agents: dict[str, Agent], *, rounds: int = 3, more: str = "") -> Charter:
    text = charter_text(agents, rounds=rounds).replace(", weight: 1", "")
    return Charter.parse(text + "secure_aggregation: {tolerated: 1}\n" + more)


class Driver:
    """A coordinator by hand. It keeps all it sees, and what each site's mechanism really released."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.plain: dict[str, list[int]] = {}
        self.keys: dict[str, Answer] = {}
        self.sealed: dict[str, dict[str, str]] = {}
        self.statements: dict[str, SiteStatement] = {}
        self.updates: dict[str, bytes] = {}
        self.agreed: dict[str, Answer] = {}
        self.opened: dict[str, Answer] = {}
        for site, agent in network.agents.items():
            agent._trainer.update = self._recording(site, agent._trainer.update)  # type: ignore[method-assign]

    def _recording(self, site: str, update: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **options: Any) -> Any:
            self.plain[site] = list(update(*args, **options))
            return self.plain[site]

        return recorded

    def step(self, kind: str, site: str, **fields: Any) -> Answer:
        header = {"run": self.network.run, "round": 1, "charter": self.network.charter.digest, **fields}
        return call(self.network.agents[site], f"masked.{kind}", header)[0]

    def ask_keys(self, sites: tuple[str, ...] = SITES) -> None:
        for site in sites:
            self.keys[site] = self.step("keys", site, attempt=0, participants=list(SITES))["keys"]

    def shown(self, sites: tuple[str, ...] = SITES) -> list[Answer]:
        enrolment = {
            site: agent.home.keys().enrolment(site, agent.population, agent._origin)
            for site, agent in self.network.agents.items()
        }
        return [
            {"enrolment": body_document(enrolment[site]), "keys": self.keys[site]}
            for site in sorted(set(sites) & set(self.keys))
        ]

    def ask_shares(self, sites: tuple[str, ...] = SITES) -> None:
        shown = self.shown()
        for site in sites:
            self.sealed[site] = self.step("shares", site, keys=shown)["shares"]

    def shares_for(self, site: str) -> dict[str, str]:
        return {other: sealed[site] for other, sealed in self.sealed.items() if other != site}

    def update(self, site: str, shares: dict[str, str] | None = None) -> Answer:
        answer, update = self.network.ask(site, 1, shares=self.shares_for(site) if shares is None else shares)
        if "statement" in answer:
            self.statements[site] = parse_body(SiteStatement, answer["statement"])
            self.updates[site] = update
        return answer

    def ask_survivors(self, sites: tuple[str, ...], survivors: tuple[str, ...] | None = None) -> None:
        for site in sites:
            self.agreed[site] = self.sign_survivors(site, survivors or tuple(sorted(self.updates)))["agreed"]

    def sign_survivors(self, site: str, survivors: tuple[str, ...]) -> Answer:
        updates = [self.statements[other].update for other in survivors]
        return self.step("survivors", site, survivors=list(survivors), updates=updates)

    def ask_open(self, sites: tuple[str, ...]) -> None:
        agreed = [self.agreed[site] for site in sorted(self.agreed)]
        for site in sites:
            self.opened[site] = self.step("open", site, agreed=agreed)["opened"]

    def transcript(self) -> Transcript:
        return Transcript(
            keys=tuple(parse_body(MaskKeys, self.keys[site]) for site in sorted(self.keys)),
            members=tuple(sorted(self.sealed)),
            agreed=tuple(parse_body(SurvivorsAgreed, self.agreed[site]) for site in sorted(self.agreed)),
            opened=tuple(parse_body(SharesOpened, self.opened[site]) for site in sorted(self.opened)[:2]),
        )

    def total(self) -> list[int]:
        return open_sum(
            RoundName(run=self.network.run, round=1, charter=self.network.charter.digest, participants=SITES),
            self.transcript(),
            {site: decode_update(update) for site, update in self.updates.items()},
            {site: statement.update for site, statement in self.statements.items()},
            lambda site: self.network.agents[site].home.keys().statement.text,
            least=2,
        )

    def expected(self) -> list[int]:
        return [sum(values) for values in zip(*(self.plain[site] for site in self.updates), strict=True)]


def own_key(driver: Driver, site: str) -> SigningKey:
    return driver.network.agents[site].home.keys().statement


def masked_run(network: Network) -> Driver:
    """Three sites that accepted a masked run; one may drop out."""
    network.charter = masked_charter(network.agents)
    network.start(network.charter)
    return Driver(network)
