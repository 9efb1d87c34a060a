"""Reading the log: what to look for, who may see what, pages with stable cursors, counts and exports.

A cursor is a leaf index, so that a page stays what it was while the log grows. An officer sees every entry;
a site what is public and what is about it; a consumer what names it. Whoever may not read the whole log asks
`log.read_own`, and each entry is then decided on its own.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Protocol

from audit.bodies import TYPES
from audit.canonical import canonical_bytes
from audit.closure import StoredLeaf
from audit.entries import IndexColumns, columns_of
from audit.errors import AuditError
from audit.principal import AttributeValue, Authorizer, Principal, Question, require

MAX_EXPORT: Final = 100_000
_PAGE: Final = 500
_SCANNED: Final = 1000  # entries looked at for one page of somebody who may not see all of them

PRIVATE_TYPES: Final = frozenset(
    {
        "access.denied",
        "alarm.closed",
        "alarm.raised",
        "audit.read",
        "evidence.exported",
        "key.bound",
        "key.created",
        "key.replaced",
        "key.revoked",
        "prediction",
        "prediction.denied",
        "prediction.reviewed",
        "round.examined",
        "site.refused",
        "site.statement",
        "site.undelivered",
        "update.refused",
        "subject.erased",
        "subject.exported",
    }
)
PUBLIC_TYPES: Final = frozenset(TYPES) - PRIVATE_TYPES  # charters, runs, rounds, versions, enrolments, rules
DECISIONS: Final = {
    "allowed": ("prediction",),
    "denied": ("access.denied", "prediction.denied"),
}  # which entries record which decision

CSV_COLUMNS: Final = (
    "leaf_index", "leaf_hash", "time", "type", "actor", "model", "version", "run", "site", "round",
    "principal", "subject", "entry",
)  # fmt: skip


class SearchTermError(AuditError):
    """A search term has no meaning; the message names it and the fix."""

    code = "audit.search_term"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What to look for; None matches everything. `after` is the last leaf index of the page before."""

    type: str | None = None
    actor: str | None = None
    model: str | None = None
    version: str | None = None
    run: str | None = None
    site: str | None = None
    principal: str | None = None  # the pseudonym that an entry names
    subject: str | None = None  # the pseudonym of the person that an entry is about
    decision: str | None = None  # "allowed" or "denied"
    since: str | None = None
    until: str | None = None
    after: int | None = None
    limit: int = 100

    def types(self) -> str | Sequence[str] | None:
        """The entry types that both `type` and `decision` allow.

        Raises:
            SearchTermError: the decision is unknown, or no entry of that type records it.
        """
        if self.decision is None:
            return self.type
        if self.decision not in DECISIONS:
            raise SearchTermError(f"decision {self.decision[:40]!r}: ask for allowed or denied")
        found = [name for name in DECISIONS[self.decision] if self.type in (None, name)]
        if not found:
            raise SearchTermError(f"no entry of type {self.type} records that something was {self.decision}")
        return found

    def columns(self) -> dict[str, Any]:
        """The ledger's filters, without cursor and limit."""
        names = ("actor", "model", "version", "run", "site", "principal", "subject", "since", "until")
        return {"type": self.types(), **{name: getattr(self, name) for name in names}}

    def terms(self) -> bytes:
        """The canonical bytes of what is asked, for the log's record of the question."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return canonical_bytes({name: value for name, value in values.items() if value is not None})


class SearchableLog(Protocol):
    """What reading needs of a ledger."""

    @property
    def tree_size(self) -> int: ...

    def search(
        self,
        *,
        type: str | Sequence[str] | None = None,
        actor: str | None = None,
        model: str | None = None,
        version: str | None = None,
        run: str | None = None,
        site: str | None = None,
        principal: str | None = None,
        subject: str | None = None,
        since: str | None = None,
        until: str | None = None,
        after: int | None = None,
        limit: int = 100,
    ) -> Sequence[StoredLeaf]: ...


class CountableLog(SearchableLog, Protocol):
    """What counting needs as well."""

    def count(self, *, before: int | None = None, after: int | None = None, **columns: Any) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Entries in log order; `next` is the cursor of the page that follows, None at the end."""

    rows: tuple[StoredLeaf, ...]
    next: int | None


def about_entry(data: bytes, leaf_index: int, action: str) -> Question:
    """Return the question about one entry: whom and which site it names, and whether it is public."""
    return _about(columns_of(data), leaf_index, action)


def search_page(
    log: SearchableLog, principal: Principal, authorizer: Authorizer, request: SearchRequest
) -> Page:
    """Return one page of what this caller may see.

    Raises:
        AccessDeniedError: the caller may read no part of the log, or not what was asked for.
        SearchTermError: a term has no meaning.
    """
    columns = request.columns()
    sees_all = may_read_all(principal, authorizer, request)
    if sees_all:
        rows = log.search(**columns, after=request.after, limit=request.limit)
        return Page(
            rows=tuple(rows), next=rows[-1].leaf_index if rows and len(rows) == request.limit else None
        )
    if principal.role in ("consumer", "tester"):
        columns["principal"] = principal.id  # all that a consumer may see names it: let the index do the work
    scanned = log.search(**columns, after=request.after, limit=_SCANNED)
    seen: list[StoredLeaf] = []
    for row in scanned:
        question = _about(columns_of(row.body), row.leaf_index, "entry.read")
        if authorizer.decide(principal, question).allowed:
            seen.append(row)
            if len(seen) == request.limit:
                return Page(rows=tuple(seen), next=row.leaf_index)
    return Page(rows=tuple(seen), next=scanned[-1].leaf_index if len(scanned) == _SCANNED else None)


def may_read_all(principal: Principal, authorizer: Authorizer, request: SearchRequest) -> bool:
    """Say whether the caller may read every entry; False: each entry is to be decided on its own.

    Raises:
        AccessDeniedError: not even its own, or it asks for another site's or principal's.
    """
    whole = Question(action="log.read", resource="log")
    if authorizer.decide(principal, whole).allowed:
        return True
    asked = {"site": request.site or "", "principal": request.principal or ""}
    require(authorizer, principal, Question(action="log.read_own", resource="log", context=asked))
    return False


def count_entries(
    log: CountableLog, principal: Principal, authorizer: Authorizer, request: SearchRequest
) -> int:
    """Return how many entries match; only for those who may read the whole log.

    Raises:
        AccessDeniedError: the caller may not.
        SearchTermError: a term has no meaning.
    """
    require(authorizer, principal, Question(action="log.read", resource="log"))
    return log.count(**request.columns(), after=request.after)


def export_rows(log: SearchableLog, request: SearchRequest, *, before: int) -> Iterator[StoredLeaf]:
    """Yield every match below leaf `before`, at most `request.limit`; the caller was authorised already."""
    left, after, columns = min(request.limit, MAX_EXPORT), request.after, request.columns()
    while left > 0:
        rows = log.search(**columns, after=after, limit=min(_PAGE, left))
        for row in rows:
            if row.leaf_index >= before:
                return
            yield row
        if len(rows) < min(_PAGE, left):
            return
        left, after = left - len(rows), rows[-1].leaf_index


def export_text(
    rows: Iterator[StoredLeaf], kind: Literal["jsonl", "csv"], *, tree_size: int, limit: int
) -> Iterator[bytes]:
    """Yield the export in pieces.

    JSON Lines end in a line {"end": true, "entries", "tree_size", "next"}: without it the file was cut off.
    CSV has a header; a text that a spreadsheet would run is preceded by an apostrophe.
    """
    count, last = 0, None
    if kind == "csv":
        yield _csv_line(CSV_COLUMNS)
    for row in rows:
        count, last = count + 1, row.leaf_index
        entry = row.body.decode()
        if kind == "jsonl":
            head = f'{{"leaf_index":{row.leaf_index},"leaf_hash":"{row.leaf_hash.hex()}","entry":'
            yield head.encode() + row.body + b"}\n"
            continue
        found = columns_of(row.body)
        named = [getattr(found, name) for name in CSV_COLUMNS[2:-1]]
        yield _csv_line([row.leaf_index, row.leaf_hash.hex(), *named, entry])
    if kind == "jsonl":
        more = last if count == min(limit, MAX_EXPORT) else None
        end = {"end": True, "entries": count, "tree_size": tree_size, "next": more}
        yield json.dumps(end).encode() + b"\n"


def with_limit(request: SearchRequest, limit: int) -> SearchRequest:
    """Return the request with another limit."""
    return replace(request, limit=limit)


def _about(columns: IndexColumns, leaf_index: int, action: str) -> Question:
    attributes: dict[str, AttributeValue] = {
        "principal": columns.principal or "",
        "site": columns.site or "",
        "public": columns.type in PUBLIC_TYPES,
    }
    return Question(action=action, resource=str(leaf_index), attributes=attributes)


def _csv_line(values: Sequence[object]) -> bytes:
    stream = io.StringIO()
    csv.writer(stream).writerow([_harmless(value) for value in values])
    return stream.getvalue().encode()


def _harmless(value: object) -> object:
    return (
        f"'{value}"
        if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r", "\n")
        else value
    )
