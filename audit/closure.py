"""The closure of one entry: every entry and artefact that a verifier needs to walk from it to the charter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol, TypeVar

from audit.answers import AnswerTerms
from audit.canonical import parse_canonical
from audit.charter_view import read_charter
from audit.entries import (
    ZERO_DIGEST,
    CharterPublished,
    CharterSigned,
    IndexColumns,
    Prediction,
    RoundAbandoned,
    RoundCompleted,
    RunAccepted,
    RunCompleted,
    RunStarted,
    SiteEnrolled,
    SiteStatement,
    SiteUndelivered,
    SubjectErased,
    VersionRegistered,
    VersionTransition,
    decode_entry,
)
from audit.errors import AuditError
from audit.evidence import scope_of
from audit.merkle import hash_leaf
from audit.round_bodies import (
    RoundExamined,
    RunEvaluated,
    RunReferenced,
    RunResumed,
    UpdateRefused,
)
from audit.secure_bodies import RoundOpened
from audit.serving_bodies import PolicyChanged, PredictionReviewed

B = TypeVar("B")
BlobSource = Callable[[str], bytes | None]
_PAGE: Final = 500
_OF_RUN: Final = (
    RunStarted,
    RunAccepted,
    RunCompleted,
    RoundCompleted,
    RoundAbandoned,
    SiteStatement,
    SiteUndelivered,
    UpdateRefused,
    RoundExamined,
    RunEvaluated,
    RunReferenced,
    RoundOpened,
    RunResumed,
)
_OF_CHARTER: Final = (Prediction, VersionRegistered, RunStarted)  # whose `charter` says what may go out


class EvidenceGapError(AuditError):
    """The log or its files lack something that the entry refers to."""

    code = "evidence.gap"


class StoredLeaf(Protocol):
    """An entry as a ledger gives it."""

    @property
    def leaf_index(self) -> int: ...
    @property
    def leaf_hash(self) -> bytes: ...
    @property
    def body(self) -> bytes: ...
    @property
    def columns(self) -> IndexColumns: ...


class EvidenceLog(Protocol):
    """What export and proof need of a ledger."""

    @property
    def tree_size(self) -> int: ...
    def entry(self, leaf_index: int) -> bytes: ...
    def inclusion_proof(self, leaf_index: int, tree_size: int) -> list[bytes]: ...
    def checkpoints(self) -> list[bytes]: ...
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


class Closure:
    """Collects what one entry rests on."""

    def __init__(
        self,
        ledger: EvidenceLog,
        blobs: BlobSource,
        tree_size: int | None = None,
        *,
        is_for_caller: bool = False,
    ) -> None:
        """Collect from the first `tree_size` entries, which a checkpoint covers; from all when None.

        With `is_for_caller`, where the charter of the version or its run restricts answers, every file that
        tells the model is left out (weights, updates, transcripts, counts, views): the public set alone is
        taken.
        """
        self._ledger, self._blobs, self._is_for_caller = ledger, blobs, is_for_caller
        self._of_model: dict[str, None] = {}  # digests, in order
        self._size = ledger.tree_size if tree_size is None else tree_size
        self.scope = "entry"
        self.entries: dict[int, bytes] = {}
        self.artefacts: dict[str, bytes] = {}

    def collect(self, leaf_index: int, data: bytes) -> None:
        """Take the entry and what it rests on: entries first, for its charters say which files may go out."""
        self._collect(leaf_index, data)
        if not (self._is_for_caller and self._is_restricted()):
            for digest in self._of_model:
                self._artefact(digest)

    def _collect(self, leaf_index: int, data: bytes) -> None:
        self._take(leaf_index, data)
        self._take(0, self._ledger.entry(0))
        for index, event, _ in self._search(object, type=("key.rotated", "log.compromise")):
            if index < self._size:
                self._take(index, event)
        entry = decode_entry(data)
        body, self.scope = entry.body, scope_of(entry.type)
        if isinstance(body, Prediction):
            self._erasure(body.subject)
            self._rules(leaf_index)
            if body.transition == ZERO_DIGEST:  # a tester's answer by a candidate
                self._by_version(body.version)
                return
            transition = self._by_hash(body.transition, VersionTransition, type="version.transition")
            self._version(transition, leaf_index)
            self._review(leaf_index, hash_leaf(data).hex(), body)
        elif isinstance(body, VersionTransition):
            self._version(body, leaf_index)
        elif isinstance(body, VersionRegistered):
            self._run(body.run, leaf_index)
            self._model_file(body.version)
        elif isinstance(body, RunCompleted):
            self._run(body.run, leaf_index)

    def _is_restricted(self) -> bool:
        """Whether a charter of the subject, its version or its run restricts answers, or cannot be read."""
        bodies = [decode_entry(data).body for data in self.entries.values()]
        named = {body.charter for body in bodies if isinstance(body, _OF_CHARTER)}
        for _, _, body in self._search(CharterPublished, type="charter.published"):
            if body.digest in named and _lets_all_out(body.canonical):
                named.remove(body.digest)
        return bool(named)

    def _erasure(self, subject: str) -> None:
        """Take the entry that says that the person was erased, if one does."""
        if not subject:
            return
        for index, data, body in self._search(SubjectErased, type="subject.erased"):
            if body.subject == subject and index < self._size:
                self._take(index, data)

    def _rules(self, until: int) -> None:
        """Take the changes of rules up to a decision: the last says by which it was made, and who signed
        them.
        """
        for index, data, _ in self._search(PolicyChanged, type="policy.changed"):
            if index < until:
                self._take(index, data)

    def _review(self, leaf_index: int, leaf_hash: str, prediction: Prediction) -> None:
        """Take every review of a decision that has legal effect; a second one would contradict the first."""
        published = {
            body.digest: body.canonical
            for body in (decode_entry(data).body for data in self.entries.values())
            if isinstance(body, CharterPublished)
        }
        canonical = published.get(prediction.charter)
        if canonical is None or not read_charter(canonical.encode()).legal_effect:
            return
        for index, data, body in self._search(
            PredictionReviewed, type="prediction.reviewed", version=prediction.version, after=leaf_index
        ):
            if body.prediction == leaf_hash and index < self._size:
                self._take(index, data)

    def _by_version(self, version: str) -> None:
        for index, data, body in self._search(VersionRegistered, type="version.registered", version=version):
            self._take(index, data)
            self._run(body.run, index)
            self._model_file(body.version)

    def _version(self, transition: VersionTransition, until: int) -> None:
        for index, data, _ in self._search(
            VersionTransition, type="version.transition", model=transition.model
        ):
            if index < until:
                self._take(index, data)
        registered = self._by_hash(transition.gate_results, VersionRegistered, type="version.registered")
        self._run(registered.run, self._index_of(transition.gate_results))
        self._model_file(transition.version)

    def _run(self, run: str, until: int) -> None:
        """Take a run, and every release of its sites' populations before leaf `until`."""
        populations: set[tuple[str, str]] = set()
        charter = ""
        for index, data, body in self._search(object, run=run):
            if index >= self._size:
                continue  # written since, under no checkpoint yet
            if isinstance(body, _OF_RUN):
                self._take(index, data)
            if isinstance(body, RunStarted):
                charter = body.charter
            if isinstance(body, RunAccepted):
                populations.add((body.site, body.population))
            if isinstance(body, (SiteStatement, UpdateRefused)):
                self._model_file(body.update)
            if isinstance(body, RoundExamined):
                self._model_file(body.digest)
            if isinstance(body, RunReferenced) and body.sketch:
                self._model_file(body.sketch)
            if isinstance(body, RoundOpened):
                self._model_file(body.transcript)
            if isinstance(body, RunCompleted):
                self._model_file(body.weights)
        for site, population in sorted(populations):
            for index, data, found in self._search(object, site=site):
                statement = found.statement if isinstance(found, SiteUndelivered) else found
                if (
                    isinstance(statement, SiteStatement)
                    and statement.population == population
                    and index < until
                ):
                    self._take(index, data)
                if isinstance(found, SiteEnrolled):
                    self._take(index, data)
        self._charter(charter)

    def _charter(self, digest: str) -> None:
        for index, data, body in self._search(CharterPublished, type="charter.published"):
            if body.digest == digest:
                self._take(index, data)
                charter = read_charter(body.text.encode())
                if charter.public_set:
                    self._artefact(charter.public_set)
                for site in charter.site_names:
                    for place, enrolment, _ in self._search(SiteEnrolled, type="site.enrolled", site=site):
                        self._take(place, enrolment)
        for index, data, signed in self._search(CharterSigned, type="charter.signed"):
            if signed.digest == digest:
                self._take(index, data)

    def _search(
        self, kind: type[B], *, after: int | None = None, **columns: Any
    ) -> Iterator[tuple[int, bytes, B]]:
        while True:
            page = self._ledger.search(**columns, after=after, limit=_PAGE)
            for stored in page:
                body: Any = decode_entry(stored.body).body
                if isinstance(body, kind):
                    yield stored.leaf_index, stored.body, body
            if len(page) < _PAGE:
                return
            after = page[-1].leaf_index

    def _by_hash(self, leaf_hash: str, kind: type[B], **columns: Any) -> B:
        for index, data, body in self._search(kind, **columns):
            if hash_leaf(data).hex() == leaf_hash:
                self._take(index, data)
                return body
        raise EvidenceGapError(f"the log has no {columns.get('type')} entry of leaf hash {leaf_hash[:16]}…")

    def _index_of(self, leaf_hash: str) -> int:
        return next(index for index, data in self.entries.items() if hash_leaf(data).hex() == leaf_hash)

    def _take(self, index: int, data: bytes) -> None:
        self.entries[index] = data

    def _model_file(self, digest: str) -> None:
        """Take a file by which the model can be rebuilt, if such files may go out."""
        self._of_model[digest] = None

    def _artefact(self, digest: str) -> None:
        data = self._blobs(digest)
        if data is not None:
            self.artefacts[digest] = data


def _lets_all_out(canonical: str) -> bool:
    try:
        document = parse_canonical(canonical.encode())
        return isinstance(document, dict) and not AnswerTerms.of_charter(document).is_restricted
    except (AuditError, KeyError):
        return False
