"""Answers at the site itself: a version of the federation's model with what stayed at this site.

Local layers and a site's own intercept are in no version, so no server answers with them. Here the site's
people do, from the version's file and the layers kept in the site's home, row by row in float64 by the same
definition that a verifier uses. Nothing leaves, nothing is entered and nobody signs: an answer of this kind
has no receipt, and no evidence file shows it.
"""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass
from typing import Any

from audit.canonical import parse_canonical
from audit.encoding import EncodingError, RowEncoder
from audit.errors import AuditError
from audit.forward import forward
from audit.models import answer_of, weights_of_file
from clients.errors import ClientsError
from clients.home import SiteHome
from clients.ledger import SiteLedger
from clients.local_layers import LocalLayers, overlaid
from clients.terms import read_terms


class LocalPredictionError(ClientsError):
    """The model, the layers or the rows for an answer at the site are not there, or do not fit."""

    code = "clients.local_prediction"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalAnswers:
    """What the site's own model answers; `own` says what of it is in no version."""

    run: str
    version: str  # digest of the file
    own: tuple[str, ...]
    answers: tuple[dict[str, Any], ...]  # as `audit.models.answer_of`, exact


def predict_here(home: SiteHome, run: str, version: bytes, rows: bytes) -> LocalAnswers:
    """Answer rows of a CSV file with the version of `run` and what this site kept of that run.

    Args:
        version: the version's file. rows: UTF-8 CSV with a header; columns that are no features are ignored.

    Raises:
        LocalPredictionError: the site did not accept the run, the file is another model's, layers that stay
            are not kept here, or a row breaks the contract; names line and column.
        HomeError: the site's ledger cannot be read, or the kept layers are damaged.
    """
    canonical = _charter_of(home, run)
    document: Any = parse_canonical(canonical.encode())
    terms = read_terms(canonical, site=home.name)
    try:
        weights = weights_of_file(terms.layers, version)
    except AuditError as error:
        raise LocalPredictionError(f"the version's file does not fit run {run}: {error}") from error
    own = []
    if terms.spans:
        kept = LocalLayers(home.local_layers_path).average(run, terms.most_rounds, terms.average_last)
        if kept is None:
            problem = f"nothing is kept here of run {run}'s local layers"
            raise LocalPredictionError(f"{problem}; a server answers with the version alone")
        weights = overlaid(terms.spans, weights, kept)
        own.append(f"local layers {', '.join(map(str, document['model']['local_layers']))}")
    if document["model"]["site_intercept"]:
        own.append("this site's intercept")
    answers = tuple(
        answer_of(terms.task, terms.label, forward(terms.layers, weights, row, terms.site_index))
        for row in _rows(rows, RowEncoder(terms.features))
    )
    return LocalAnswers(run=run, version=hashlib.sha256(version).hexdigest(), own=tuple(own), answers=answers)


def _charter_of(home: SiteHome, run: str) -> str:
    ledger = SiteLedger(home.ledger_path, home.high_water_path, look=True)
    try:
        reservation = ledger.reservation(run)
    finally:
        ledger.close()
    if reservation is None:
        raise LocalPredictionError(f"this site accepted no run {run!r}")
    return reservation.charter


def _rows(data: bytes, encoder: RowEncoder) -> list[list[float]]:
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        header = list(reader.fieldnames or ())
        missing = [name for name in encoder.names if name not in header]
        if missing or len(set(header)) != len(header):
            raise LocalPredictionError(f"the header lacks {missing}, or names a column twice")
        found = []
        for number, row in enumerate(reader, start=2):
            try:
                found.append(encoder.encode({name: row[name] for name in encoder.names}))
            except EncodingError as error:
                raise LocalPredictionError(f"line {number}: {error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise LocalPredictionError(f"the rows are not UTF-8 CSV: {error}") from error
    if not found:
        raise LocalPredictionError("there are no rows")
    return found
