"""Does somebody study the model instead of using it? Pure functions over the last rows of one principal.

* **extraction**: rows placed where answers tell most. Either most of them lie close to the model's boundary,
  or most differ from the row before in one feature alone (a walk along a grid).
* **membership**: many different rows crowd around one point, as when somebody asks how a model treats a
  person and the person's near neighbours.
* **out_of_distribution**: more rows lie beyond the limit of the sketch or the bounds than chance allows.

The thresholds are shares of a window that is full enough, so that neither a busy caller nor a worker that
sees only part of the requests shifts them. Who repeats the very same row is not counted: that is a retry.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, Literal, NamedTuple, TypeAlias

Kind: TypeAlias = Literal["extraction", "membership", "out_of_distribution"]

WINDOW: Final = 256  # rows of one principal for one model
LEAST: Final = 64  # fewer say nothing
NEAR_BOUNDARY: Final = 0.02  # of probability, from even chances
BOUNDARY_SHARE: Final = 0.5
WALK_SHARE: Final = 0.6
CROWD_RADIUS: Final = 0.02  # mean distance an input, of the encoded range [-1, 1]
CROWD_SHARE: Final = 0.25
OUT_SHARE: Final = 0.3
_EQUAL: Final = 1e-12


class Look(NamedTuple):
    """What is remembered of one answered row: in memory only, for as long as the window is."""

    row: tuple[float, ...]  # encoded
    margin: float | None  # distance of the best class's probability from the next; None: the task has none
    out: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """A threshold that a window passed."""

    kind: Kind
    measure: str
    value: float
    threshold: float


@dataclass(slots=True)
class Window:
    """One principal's last rows for one model."""

    looks: deque[Look] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, look: Look) -> None:
        """Remember a row, unless it is the one before again."""
        if not self.looks or self.looks[-1].row != look.row:
            self.looks.append(look)

    def suspicions(self) -> tuple[Suspicion, ...]:
        """Return every threshold that the window passes now."""
        looks = tuple(self.looks)
        if len(looks) < LEAST:
            return ()
        found = (detect(looks) for detect in DETECTORS)
        return tuple(one for one in found if one is not None)


def near_boundary(looks: Sequence[Look]) -> Suspicion | None:
    """Most answers of known confidence are close to even."""
    margins = [look.margin for look in looks if look.margin is not None]
    if len(margins) < LEAST:
        return None
    share = sum(margin < 2 * NEAR_BOUNDARY for margin in margins) / len(margins)
    return _above("extraction", "share_near_boundary", share, BOUNDARY_SHARE)


def walks_a_grid(looks: Sequence[Look]) -> Suspicion | None:
    """Most rows differ from the one before in one input alone (or in one category's two)."""
    if not looks or len(looks[0].row) < 3:
        return None  # of one or two inputs, honest rows often differ in one
    steps = sum(_changed(before.row, after.row) == 1 for before, after in pairwise(looks))
    return _above("extraction", "share_of_single_steps", steps / (len(looks) - 1), WALK_SHARE)


def crowds(looks: Sequence[Look]) -> Suspicion | None:
    """Many different rows lie around the newest one."""
    centre = looks[-1].row
    reach = CROWD_RADIUS * len(centre)
    near = {look.row for look in looks if look.row != centre and _distance(look.row, centre, reach) <= reach}
    return _above("membership", "share_around_one_point", len(near) / len(looks), CROWD_SHARE)


def storms(looks: Sequence[Look]) -> Suspicion | None:
    """More rows than chance allows are out of distribution."""
    share = sum(look.out for look in looks) / len(looks)
    return _above("out_of_distribution", "share_out_of_distribution", share, OUT_SHARE)


DETECTORS: Final[tuple[Callable[[Sequence[Look]], Suspicion | None], ...]] = (
    near_boundary,
    walks_a_grid,
    crowds,
    storms,
)


def margin_of(answer: Mapping[str, object]) -> float | None:
    """Return how far the answered class is ahead of the next; None where the answer holds no probability.

    By the exact answer: one that was rounded to no decimals, or is a label alone, is never near a boundary.
    """
    if "probability" in answer:
        return abs(2.0 * float(str(answer["probability"])) - 1.0)
    chances = answer.get("probabilities")
    if isinstance(chances, list) and len(chances) > 1:
        best, second = sorted((float(chance) for chance in chances), reverse=True)[:2]
        return best - second
    return None


def _above(kind: Kind, measure: str, value: float, threshold: float) -> Suspicion | None:
    if value <= threshold:
        return None
    return Suspicion(kind=kind, measure=measure, value=value, threshold=threshold)


def _changed(before: Sequence[float], after: Sequence[float]) -> int:
    """How many features differ; a category that moved from one 0/1 input to another counts once."""
    moved = [b - a for a, b in zip(before, after, strict=True) if abs(a - b) > _EQUAL]
    if len(moved) == 2 and sorted(moved) == [-1.0, 1.0]:
        return 1
    return len(moved)


def _distance(row: Sequence[float], centre: Sequence[float], reach: float) -> float:
    total = 0.0
    for a, b in zip(row, centre, strict=True):
        total += abs(a - b)
        if total > reach:
            break
    return total
