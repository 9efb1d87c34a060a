"""The reference sketch and the score of how far a row is from it.

A charter's `reference` has every site count its training rows by feature and declared bin, once, after the
last round. It adds discrete Gaussian noise to every bin and releases the counts under a statement of its own:
an event on its odometer like any other. A row falls into one bin of each of F features, so a person of m rows
moves the counts by m * sqrt(F) at most, in L2 norm; one row replaced by another by less than twice that.

The score of a row is the mean, over its features, of -ln of its bin's share in the summed counts. What counts
as far follows from the sketch alone: three spreads above the mean that the sketch's own shares give, where
the spreads of the features are added up as if all moved together; by Cantelli's inequality at most one row in
ten of those that the sketch describes lies beyond, whatever the features have to do with each other.

Where no sketch was paid for, the declared bounds are all there is: the score is the share of numbers in the
outermost twentieth of their declared range at either end, and says so (`basis` is "bounds").
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final, TypeAlias

from audit.bodies import MechanismEvent
from audit.canonical import canonical_bytes, parse_canonical
from audit.decimals import parse_decimal, rounded_text
from audit.errors import AuditError

GRID_BITS: Final = 16
MAX_SIGMA_GRID: Final = 1 << 32  # what sites can draw
MAX_BINS: Final = 64
SPREADS: Final = 3
_JUDGED: Final = 1024
EDGE: Final = 0.95  # of the encoded range [-1, 1]
EDGE_LIMIT: Final = 0.5

Ood: TypeAlias = dict[str, Any]  # {"basis": "reference" | "bounds", "out": bool, "score": decimal text}


class SketchError(AuditError):
    """The terms of a reference sketch, or the sketch, do not hold."""

    code = "audit.reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A charter's terms of a sketch, and the event that each site's release must carry."""

    bins: int
    widths: tuple[int, ...]  # bins of each feature
    event: MechanismEvent

    @classmethod
    def of_charter(cls, charter: Mapping[str, Any]) -> Reference | None:
        """Read the terms from a charter's canonical JSON values; None where it has none.

        Raises:
            SketchError: they are out of range.
        """
        part: Mapping[str, Any] | None = charter.get("reference")
        if part is None:
            return None
        privacy, bins = charter["privacy"], part["bins"]
        noise = Fraction(parse_decimal(part["noise_multiplier"]))
        if not 2 <= bins <= MAX_BINS or noise <= 0:
            raise SketchError(f"reference.bins lies in 2 to {MAX_BINS}, its noise_multiplier above 0")
        widths = feature_bins(charter["features"], bins)
        rows = privacy["max_rows_per_subject"] if privacy["unit"] == "subject" else 1
        moved = sketch_sensitivity(len(widths), rows=rows, relation=privacy["relation"])
        if noise * moved > MAX_SIGMA_GRID:
            most = MAX_SIGMA_GRID // moved
            raise SketchError(f"reference.noise_multiplier is {noise}; sites can draw at most {most}")
        event = MechanismEvent(
            mechanism="discrete_gaussian",
            sampling="full",
            sample_rate="1",
            steps=1,
            sigma_grid=math.ceil(noise * moved),
            sensitivity_grid=moved,
            dimension=sum(widths),
            grid_bits=GRID_BITS,
            relation=privacy["relation"],
            unit=privacy["unit"],
        )
        return cls(bins=bins, widths=widths, event=event)


def sketch_sensitivity(features: int, *, rows: int, relation: str) -> int:
    """Return the bound, in grid units, on the L2 distance of two neighbouring sketches: m * sqrt(F), rounded
    up, and twice that where one row replaces another.
    """
    square = rows * rows * features << (2 * GRID_BITS)
    return (2 if relation == "replace_one" else 1) * (math.isqrt(square - 1) + 1)


def feature_bins(features: Sequence[Mapping[str, Any]], bins: int) -> tuple[int, ...]:
    """Return how many bins each feature has: its categories, two for a boolean, else `bins`."""
    fixed = {"boolean": 2}
    return tuple(
        len(feature["categories"]) if feature["type"] == "category" else fixed.get(feature["type"], bins)
        for feature in features
    )


def row_bins(
    features: Sequence[Mapping[str, Any]], widths: Sequence[int], encoded: Sequence[float]
) -> list[int]:
    """Return the flat bin that an encoded row falls into for each feature; a missing category has none.

    Numbers: `bins` equal parts of the encoded range [-1, 1], the last one closed.
    """
    found, place, start = [], 0, 0
    for feature, width in zip(features, widths, strict=True):
        if feature["type"] == "category":
            values = encoded[place : place + width]
            place += width
            if max(values) > 0.5:
                found.append(start + max(range(width), key=lambda k: (values[k], -k)))
        else:
            value = encoded[place]
            place += 1
            found.append(start + min(width - 1, max(0, math.floor((value + 1.0) / 2.0 * width))))
        start += width
    return found


def sketch_document(
    reference: Reference, *, run: str, charter: str, sites: Sequence[str], counts: Sequence[Sequence[int]]
) -> bytes:
    """Return the sketch: the sites' noisy counts added up, in grid units, as canonical JSON.

    Raises:
        SketchError: a site's counts are of another length.
    """
    size = sum(reference.widths)
    if not counts or any(len(values) != size for values in counts):
        raise SketchError(f"a sketch of this charter has {size} counts a site")
    total = [sum(cells) for cells in zip(*counts, strict=True)]
    return canonical_bytes(
        {
            "affidavit_reference": 1,
            "run": run,
            "charter": charter,
            "sites": list(sites),
            "widths": list(reference.widths),
            "counts": [str(value) for value in total],
        }
    )


def sketch_counts(data: bytes, *, digest: str, reference: Reference) -> tuple[int, ...]:
    """Return the summed counts of a sketch's file.

    Raises:
        SketchError: not the bytes of that digest, or no sketch of these terms.
    """
    if hashlib.sha256(data).hexdigest() != digest:
        raise SketchError("the sketch's bytes are not those that the log names")
    document = parse_canonical(data)
    counts = document.get("counts") if isinstance(document, dict) else None
    if not isinstance(document, dict) or document.get("widths") != list(reference.widths):
        raise SketchError("the sketch's bins are not the charter's")
    if not isinstance(counts, list) or len(counts) != sum(reference.widths):
        raise SketchError("the sketch has another number of counts than the charter's bins")
    return tuple(int(parse_decimal(value)) for value in counts)


class OodScorer:
    """Scores encoded rows of one charter; equal to the verifier's, for it is the verifier's."""

    def __init__(
        self,
        features: Sequence[Mapping[str, Any]],
        *,
        reference: Reference | None = None,
        counts: Sequence[int] = (),
    ) -> None:
        """`counts`: of the paid sketch, with its terms; without them the declared bounds are all there is."""
        self._features = tuple(features)
        self._are_numbers = bool(features) and all(f["type"] in ("number", "integer") for f in features)
        self._widths: tuple[int, ...] = ()
        self._surprise: list[float] = []
        self._limit = EDGE_LIMIT
        self._judged: dict[str, bool] = {}  # scores that many rows have
        if reference is not None and counts:
            self._widths = reference.widths
            self._learn(counts)

    @property
    def basis(self) -> str:
        return "reference" if self._widths else "bounds"

    @property
    def limit(self) -> str:
        """The score above which a row counts as out, as decimal text."""
        return rounded_text(self._limit)

    def score(self, encoded: Sequence[float]) -> Ood:
        """Return one encoded row's score."""
        value = self._by_sketch(encoded) if self._widths else self._by_bounds(encoded)
        text = rounded_text(value)
        is_out = self._judged.get(text)
        if is_out is None:
            if len(self._judged) >= _JUDGED:
                self._judged.clear()
            is_out = self._judged[text] = parse_decimal(text) > parse_decimal(self.limit)
        return {"basis": self.basis, "out": is_out, "score": text}

    def differs(self, claimed: object, encoded: Sequence[float]) -> str:
        """Return how a claimed score differs from this one's by more than rounding, or ""."""
        ours = self.score(encoded)
        if not isinstance(claimed, Mapping) or set(claimed) != set(ours) or claimed["basis"] != ours["basis"]:
            return f"the score on the file is {claimed!s:.80}, not one by {ours['basis']}"
        try:
            theirs, mine = parse_decimal(claimed["score"]), parse_decimal(ours["score"])
        except AuditError as error:
            return f"the score is no number: {error}"
        grain = Decimal("0.000001")
        if abs(theirs - mine) > grain:
            return f"the score is {theirs}, the sketch gives {mine}"
        if claimed["out"] is not (theirs > parse_decimal(self.limit)):
            return f"a score of {theirs} is said to be out: {claimed['out']}; the limit is {self.limit}"
        return ""

    def _learn(self, counts: Sequence[int]) -> None:
        start, mean, spread = 0, 0.0, 0.0
        one = 1 << GRID_BITS
        for width in self._widths:
            cells = [max(0, count) + one for count in counts[start : start + width]]
            total = sum(cells)
            shares = [cell / total for cell in cells]
            surprise = [-math.log(share) for share in shares]
            centre = math.fsum(p * s for p, s in zip(shares, surprise, strict=True))
            second = math.fsum(p * (s - centre) ** 2 for p, s in zip(shares, surprise, strict=True))
            self._surprise += surprise
            mean, spread, start = mean + centre, spread + math.sqrt(second), start + width
        self._limit = (mean + SPREADS * spread) / len(self._widths)

    def _by_sketch(self, encoded: Sequence[float]) -> float:
        found = [self._surprise[place] for place in row_bins(self._features, self._widths, encoded)]
        return math.fsum(found) / len(found) if found else 0.0

    def _by_bounds(self, encoded: Sequence[float]) -> float:
        if self._are_numbers and min(encoded) > -EDGE and max(encoded) < EDGE:
            return 0.0
        place, numbers, edges = 0, 0, 0
        for feature in self._features:
            if feature["type"] in ("number", "integer"):
                numbers, edges = numbers + 1, edges + (abs(encoded[place]) >= EDGE)
            place += len(feature["categories"]) if feature["type"] == "category" else 1
        return edges / numbers if numbers else 0.0
