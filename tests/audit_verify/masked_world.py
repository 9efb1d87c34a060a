"""The tiny federation with masked updates: west drops out of round 2 once it has shared its secrets.

`tamper` sees every piece of a round's transcript before it is signed, `spoil` the transcript before it is
kept, `masks` the masked integers before they are: each a place to lie.
"""

from __future__ import annotations

import base64
import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from audit.entries import RoundCompleted, SiteStatement, event_hash
from audit.masking import combined, mask_words, own_mask_key, pair_mask_key, seed_commitment, sign_of
from audit.models import model_file
from audit.replay import Aggregator, SiteUpdate
from audit.secure_bodies import MaskKeys, RoundOpened, SharesOpened, SurvivorsAgreed
from audit.secure_round import Transcript, keys_digest, roster_digest
from audit.shamir import split
from audit.shared_noise import share_grid
from audit.weights import encode_update
from tests.audit_verify.hospitals import Hospital
from tests.audit_verify.world import World

LEAST = 2


class MaskedWorld(World):
    """As `World`; any two of its three hospitals make the noise, and open a round."""

    def __init__(
        self,
        *,
        tamper: Callable[[MaskedWorld, Any], Any] | None = None,
        spoil: Callable[[MaskedWorld, int, Transcript], Transcript] | None = None,
        masks: Callable[[MaskedWorld, int, str, list[int]], list[int]] | None = None,
        **options: Any,
    ) -> None:
        self.tamper = tamper or (lambda world, body: body)
        self.spoil = spoil or (lambda world, number, transcript: transcript)
        self.masks = masks or (lambda world, number, site, values: values)
        self.gone: set[str] = set()
        self.plain: dict[tuple[int, str], list[int]] = {}
        change = options.pop("charter_changes", None)

        def secure(document: dict[str, Any]) -> None:
            document["secure_aggregation"] = {"tolerated": 1}
            if change:
                change(document)

        super().__init__(charter_changes=secure, **options)

    def event(self) -> Any:
        event = super().event()
        sharers = self.charter.secure.sharers if self.charter.secure else 2
        return dataclasses.replace(event, sharers=sharers, share_grid=share_grid(event.sigma_grid, sharers))

    def piece(self, body: Any, hospital: Hospital) -> Any:
        return self.sign(self.tamper(self, body), hospital.statement)

    def round(
        self, run: str, number: int, weights: list[float], base: str, previous: str, aggregator: Aggregator
    ) -> tuple[list[float], str, str]:
        there = [hospital for hospital in self.hospitals if hospital.name not in self.gone]
        names = tuple(hospital.name for hospital in there)
        if number == 2:
            self.gone.add("west")
        left = [hospital for hospital in there if hospital.name not in self.gone]
        survivors = tuple(hospital.name for hospital in left)
        masked = _Masks(self, run, number, there)
        statements, leaves, updates = [], [], {}
        for hospital in left:
            plain = self.plain[number, hospital.name] = self._update(hospital, weights)
            values = self.masks(self, number, hospital.name, masked.apply(hospital.name, plain))
            updates[hospital.name] = values
            body = self.lie(
                SiteStatement(
                    run=run, round=number, charter=self.charter.digest, site=hospital.name,
                    population=hospital.population, base_model=base, participants=names,
                    agent_code="ab" * 32, previous_round=previous, event=self.event(),
                    sequence=hospital.sequence + 1, previous_event=hospital.head,
                    update=self.put(encode_update(values)), signature="", roster=masked.roster,
                )
            )  # fmt: skip
            hospital.sequence, hospital.head = body.sequence, event_hash(body)
            statements.append(self.sign(body, hospital.statement))
            leaves.append(self.append(statements[-1])[1])
        transcript = masked.transcript(left, tuple(body.update for body in statements))
        total = combined(len(weights), [(1, self.plain[number, name]) for name in survivors])
        opened = self.lie(
            RoundOpened(
                run=run, round=number, roster=masked.roster, survivors=survivors,
                transcript=self.put(self.spoil(self, number, transcript).encode()),
                total=self.put(encode_update(total)),
            )
        )  # fmt: skip
        if opened is not None:
            self.append(opened)
        rows = sum(self.charter.site(name).nominal_rows for name in survivors)
        update = SiteUpdate(site="sum", nominal_rows=rows, weight=float(rows), values=total)
        weights = aggregator.step(number, weights, [update])
        output = self.put(model_file(self.charter.layers, weights))
        missing = tuple(name for name in names if name not in survivors)
        completed = RoundCompleted(
            run=run, round=number, base_model=base, statements=tuple(leaves), missing=missing,
            output_model=output, metrics=(),
        )  # fmt: skip
        return weights, output, self.append(self.lie(completed))[1]

    def _claim(self, hospital: Hospital, run: str) -> Any:
        claim = super()._claim(hospital, run)
        return dataclasses.replace(claim, events=hospital.sequence)


class _Masks:
    """One round's keys, shares and masks, written out from the definitions."""

    def __init__(self, world: MaskedWorld, run: str, number: int, there: Sequence[Hospital]) -> None:
        self.world, self.there = world, there
        self.name = {"run": run, "round": number, "charter": world.charter.digest}
        self.private = {h.name: X25519PrivateKey.generate() for h in there}
        self.seeds = {h.name: secrets.token_bytes(32) for h in there}
        participants = tuple(h.name for h in there)
        self.keys = tuple(
            world.piece(
                MaskKeys(
                    **self.name, site=h.name, participants=participants, signature="",
                    mask_key=_public(self.private[h.name]), share_key=_public(X25519PrivateKey.generate()),
                    seed=seed_commitment(self.seeds[h.name]),
                ),
                h,
            )
            for h in there
        )  # fmt: skip
        self.binding = keys_digest(self.keys)
        self.roster = roster_digest(self.binding, participants)
        terms = {"holders": len(there), "threshold": LEAST}
        self.seed_shares = {site: split(seed, **terms) for site, seed in self.seeds.items()}
        self.key_shares = {
            site: split(key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()), **terms)
            for site, key in self.private.items()
        }

    def apply(self, site: str, values: list[int]) -> list[int]:
        size = len(values)
        parts: list[tuple[int, Sequence[int]]] = [
            (1, values),
            (1, mask_words(own_mask_key(self.seeds[site], self.binding, site), size)),
        ]
        for other in self.keys:
            if other.site != site:
                public = base64.b64decode(other.mask_key)
                key = pair_mask_key(self.private[site], public, self.binding, (site, other.site))
                parts.append((sign_of(site, other.site), mask_words(key, size)))
        return combined(size, parts)

    def transcript(self, left: Sequence[Hospital], updates: tuple[str, ...]) -> Transcript:
        members = tuple(h.name for h in self.there)
        survivors = tuple(h.name for h in left)
        agreed = tuple(
            self.world.piece(
                SurvivorsAgreed(
                    **self.name, site=h.name, roster=self.roster, survivors=survivors, updates=updates,
                    signature="",
                ),
                h,
            )
            for h in left
        )  # fmt: skip
        opened = tuple(
            self.world.piece(
                SharesOpened(
                    **self.name, site=h.name, roster=self.roster, signature="",
                    seeds=tuple(self.seed_shares[site][members.index(h.name)].hex() for site in survivors),
                    keys=tuple(
                        self.key_shares[site][members.index(h.name)].hex()
                        for site in members
                        if site not in survivors
                    ),
                ),
                h,
            )
            for h in left[:LEAST]
        )  # fmt: skip
        return Transcript(keys=self.keys, members=members, agreed=agreed, opened=opened)


def _public(key: X25519PrivateKey) -> str:
    return base64.b64encode(key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()
