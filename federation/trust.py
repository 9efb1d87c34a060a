"""The policy that a federation's readers are given: its log's keys, its sites as witnesses, and their quorum.

What comes out of `log_policy` is a proposal: it says what the log says. A reader compares it with what the
other members hold before believing it, since whoever runs the log wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from audit.entries import SiteEnrolled, decode_entry
from audit.ledger import Ledger
from audit.ledger_keys import keys_of
from audit.log_keys import LogKeys
from audit.tlog_policy import NO_QUORUM, Policy

QUORUM: Final = "members"
OPERATOR: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


def federation_policy(
    log_key: str | Sequence[str],
    witnesses: Mapping[str, str],
    *,
    operators: Mapping[str, str] | None = None,
) -> Policy:
    """Return the policy of a log whose n sites are its witnesses: w of n, 2w > n + f, f = (n - 1) / 3.

    Args:
        log_key: the log's vkey, or several while one takes over from another, the newest first.
        witnesses: each site's witness vkey; with none the quorum is `none`.
        operators: who runs a site's machines, where several sites share an operator. Sites under one
            operator count once, as `group <operator> any`, because whoever runs both can make both sign.
    """
    shared: dict[str, list[str]] = {}
    for name in sorted(witnesses):
        shared.setdefault((operators or {}).get(name) or name, []).append(name)
    voices: dict[str, list[str]] = {}
    for operator, sites in shared.items():
        name = sites[0] if len(sites) == 1 else operator
        voices[f"operator:{name}" if len(sites) > 1 and name in witnesses else name] = sites
    count = len(voices)
    need = (count + (count - 1) // 3) // 2 + 1
    lines = [f"log {key}" for key in ([log_key] if isinstance(log_key, str) else log_key)]
    for site, key in sorted(witnesses.items()):
        lines.append(f"witness {site} {key}")
    for name, sites in sorted(voices.items()):
        if len(sites) > 1:
            lines.append(f"group {name} any {' '.join(sites)}")
    if not voices:
        return Policy.parse("\n".join([*lines, f"quorum {NO_QUORUM}", ""]))
    quorum = QUORUM if QUORUM not in (*voices, *witnesses) else f"quorum:{QUORUM}"
    lines += [f"group {quorum} {need} {' '.join(sorted(voices))}", f"quorum {quorum}"]
    return Policy.parse("\n".join(lines) + "\n")


def log_policy(ledger: Ledger) -> Policy:
    """Return the policy that a log's own entries give: keys not known as stolen, and every enrolled site.

    A key that retired in good order stays, because what it signed stays good; trees beyond its end are
    refused by the entry that ended it. Sites that name one operator count once.

    Raises:
        LogKeyError: an entry about a key is not signed as it must be.
    """
    latest: dict[str, SiteEnrolled] = {}
    after: int | None = None
    while rows := ledger.search(type="site.enrolled", after=after, limit=1000):
        for row in rows:
            body = decode_entry(row.body).body
            if isinstance(body, SiteEnrolled):
                latest[body.site] = body
        after = rows[-1].leaf_index
    return federation_policy(
        good_keys(keys_of(ledger)),
        {site: body.witness_key for site, body in latest.items()},
        operators={site: body.operator for site, body in latest.items() if OPERATOR.fullmatch(body.operator)},
    )


def good_keys(keys: LogKeys) -> tuple[str, ...]:
    """Return the vkeys that no entry calls stolen, newest first."""
    good = [vkey for vkey, key in keys.keys.items() if key.compromised_at is None]
    return tuple(reversed(good))
