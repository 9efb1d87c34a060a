"""Layers that stay at a site: their parameters between rounds, in the site's own folder and nowhere else.

A charter's `model.local_layers` are trained by the site's own noised sums, as everything is, and never
released: updates hold the shared coordinates alone, and model files hold the charter's initial values in
their place. One file a round is written before the round's release is committed, so that a crash in between
costs nothing: the round is then computed anew from the round before. What is lost with the folder is the
personal part of the model; no privacy depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from audit._files import write_durably
from audit.errors import AuditError
from audit.weights import decode_weights, encode_weights
from clients.errors import HomeError

if TYPE_CHECKING:
    from clients.terms import Terms

V = TypeVar("V", int, float)
Spans = Sequence[tuple[int, int]]

_RUN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TENSOR: Final = "local"


class LocalLayers:
    """The kept parameters of one site, by run and round."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, run: str, server_round: int) -> list[float] | None:
        """Return what the site kept after a round; None before the first, and where nothing was kept.

        Raises:
            HomeError: the file is damaged.
        """
        path = self._path(run, server_round)
        if not path.exists():
            return None
        try:
            return decode_weights(path.read_bytes())[_TENSOR][1]
        except (AuditError, KeyError) as error:
            fix = "remove it; the layers then start from the charter's values"
            raise HomeError(path, "is damaged", fix) from error

    def load_before(self, run: str, server_round: int) -> list[float] | None:
        """Return what the site kept after its last round before `server_round`; errors as `load`."""
        earlier = [number for number in self._numbers(run) if number < server_round]
        return self.load(run, earlier[-1]) if earlier else None

    def drop(self, run: str, server_round: int) -> None:
        """Forget what was kept after a round that was abandoned."""
        self._path(run, server_round).unlink(missing_ok=True)

    def save(self, run: str, server_round: int, values: Sequence[float], *, keep: int) -> None:
        """Keep the parameters after a round, and those of the `keep` - 1 kept before it."""
        path = self._path(run, server_round)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        write_durably(path, encode_weights({_TENSOR: ((len(values),), values)}), replace=True)
        for number in self._numbers(run)[: -max(2, keep)]:
            self.drop(run, number)

    def average(self, run: str, last_round: int, count: int) -> list[float] | None:
        """Return the mean over the last `count` rounds kept, as a version averages its weights."""
        numbers = [number for number in self._numbers(run) if number <= last_round][-count:]
        found = [self.load(run, number) for number in numbers]
        kept = [values for values in found if values is not None]
        if not kept:
            return None
        return [sum(column) / len(kept) for column in zip(*kept, strict=True)]

    def _numbers(self, run: str) -> list[int]:
        """The rounds of a run that something is kept of, ascending."""
        _check_name(self._folder, run)
        found = (path.name[len(run) + 1 :].split(".") for path in self._folder.glob(f"{run}.*.safetensors"))
        return sorted(int(number) for number, *rest in found if number.isdigit() and rest == ["safetensors"])

    def _path(self, run: str, server_round: int) -> Path:
        _check_name(self._folder, run)
        return self._folder / f"{run}.{server_round}.safetensors"


def _check_name(folder: Path, run: str) -> None:
    if not _RUN.fullmatch(run):
        raise HomeError(folder, f"cannot keep layers of run {run[:40]!r}", "use a plain run name")


def shared_values(spans: Spans, flat: Sequence[V]) -> list[V]:
    """Return the coordinates that are released; all, where `spans` is empty."""
    if not spans:
        return list(flat)
    return [value for start, stop in spans for value in flat[start:stop]]


def local_values(spans: Spans, flat: Sequence[V]) -> list[V]:
    """Return the coordinates that stay."""
    return [value for start, stop in _gaps(spans, len(flat)) for value in flat[start:stop]]


def overlaid(spans: Spans, flat: Sequence[float], local: Sequence[float]) -> list[float]:
    """Return `flat` with the coordinates that stay replaced by `local`.

    Raises:
        HomeError: another number of coordinates, so another charter's layers.
    """
    if len(local) != len(local_values(spans, flat)):
        raise HomeError(Path("local_layers"), "hold another model's parameters", "remove that run's files")
    result, given = list(flat), iter(local)
    for start, stop in _gaps(spans, len(flat)):
        for place in range(start, stop):
            result[place] = next(given)
    return result


def moved_locally(terms: Terms, scale: float, weights: Sequence[float], update: Sequence[int]) -> list[float]:
    """Return the kept parameters after a round, from the round's noised integers over all coordinates.

    With one step these are a sum of gradients, and the site takes its own step with the local learning rate;
    with more they are the difference of weights that the local steps made.
    """
    before, moved = local_values(terms.spans, weights), local_values(terms.spans, update)
    step = 1.0 if terms.local_steps > 1 else -terms.local_learning_rate / terms.normaliser
    step = step / scale
    return [w + step * m for w, m in zip(before, moved, strict=True)]


def _gaps(spans: Spans, size: int) -> list[tuple[int, int]]:
    edges = [0, *(edge for span in spans for edge in span), size]
    return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]
