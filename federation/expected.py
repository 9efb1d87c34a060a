"""What a round's statements must say, written once: an answer with these bytes is not read as JSON again.

A statement's canonical form is decided by the round's terms but for the digest of the agent's code, that of
the update, and the signature. An answer that is exactly those bytes around such three parts is that
statement; whatever is not is read strictly, and the reading names what is wrong. Nothing is believed here:
`federation.statements` proves either alike.
"""

from __future__ import annotations

import re
from typing import Any, Final

from audit.canonical import JsonValue, parse_strict
from audit.changed_body import with_fields
from audit.entries import ZERO_DIGEST, SiteStatement, body_bytes
from federation.statements import RoundTerms

_ANSWER: Final = re.compile(
    rb'\{"statement":\{"agent_code":"([0-9a-f]{64})",.*'
    rb',"signature":"([A-Za-z0-9+/]{86}==)","site":".*","update":"([0-9a-f]{64})"\}\}',
    re.DOTALL,
)


class ExpectedStatements:
    """The statements of one open round."""

    def __init__(self, terms: RoundTerms) -> None:
        self._terms = terms
        self._blank = SiteStatement(
            run=terms.run,
            round=terms.round,
            charter=terms.charter,
            site="",
            population="",
            base_model=terms.base_model,
            participants=terms.participants,
            agent_code=ZERO_DIGEST,
            previous_round=terms.previous_round,
            event=terms.event,
            sequence=0,
            previous_event=ZERO_DIGEST,
            update=ZERO_DIGEST,
            signature="",
            roster=terms.roster,
        )

    def read(self, site: str, raw: bytes) -> JsonValue | dict[str, Any]:
        """Return `{"statement": SiteStatement}` for what the site must answer, signed well or not.

        For any other bytes it returns what `parse_strict` returns, and raises what that raises.
        """
        found, terms = _ANSWER.fullmatch(raw), self._terms
        if found is not None and site in terms.enrolments and site in terms.heads:
            agent_code, signature, update = (part.decode() for part in found.groups())
            statement = with_fields(
                self._blank,
                site=site,
                population=terms.enrolments[site].population,
                agent_code=agent_code,
                sequence=terms.heads[site].sequence + 1,
                previous_event=terms.heads[site].event_hash,
                update=update,
                signature=signature,
            )
            if raw == b'{"statement":%b}' % body_bytes(statement):
                return {"statement": statement}
        return parse_strict(raw)
