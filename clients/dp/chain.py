"""The same book-keeping for a chain of Linear layers and activations, with the backward pass written out.

Such a model needs no autograd graph, and for small ones the graph is most of the work. Anything else takes
`BookPass`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clients.dp.layers import LayerBook, LinearBook, SiteInterceptBook
from clients.dp.losses import OutputGradient

_relu_backward = torch.ops.aten.threshold_backward.default
_tanh_backward = torch.ops.aten.tanh_backward.default
_sigmoid_backward = torch.ops.aten.sigmoid_backward.default

_ACTIVATIONS: dict[type[nn.Module], tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    nn.ReLU: (torch.relu, lambda g, out: _relu_backward(g, out, 0)),
    nn.Tanh: (torch.tanh, lambda g, out: _tanh_backward(g, out)),
    nn.Sigmoid: (torch.sigmoid, lambda g, out: _sigmoid_backward(g, out)),
    nn.Identity: (lambda x: x, lambda g, out: g),
}


@dataclass(frozen=True, slots=True)
class _Link:
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor] | None  # (output gradient, output) -> input gradient
    book: LayerBook | None
    weight: Tensor | None  # of a Linear layer


def links_of(steps: Sequence[object], books: dict[nn.Module, LayerBook]) -> list[_Link] | None:
    """Return the chain's links, or None if a step is no trainable Linear, intercept or activation."""
    links, seen = [], set()
    for step in steps:
        book = books.get(step) if isinstance(step, nn.Module) else None
        if step in seen and book is not None:
            return None
        seen.add(step)
        if isinstance(book, LinearBook):
            links.append(_Link(book.apply, None, book, book.weight))
        elif isinstance(book, SiteInterceptBook):
            links.append(_Link(book.apply, lambda g, out: g, book, None))
        elif type(step) in _ACTIVATIONS:
            forward, backward = _ACTIVATIONS[type(step)]  # type: ignore[index]
            links.append(_Link(forward, backward, None, None))
        else:
            return None
    return links if any(link.book for link in links) else None


class ChainPass:
    """Forward with every output kept, then one walk back that takes norms on the way."""

    def __init__(self, links: list[_Link], gradient: OutputGradient) -> None:
        self._links = links
        self._first = next(place for place, link in enumerate(links) if link.book)
        self._gradient = gradient

    def square_norms(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        with torch.no_grad():
            values = [inputs]
            for link in self._links:
                values.append(link.forward(values[-1]))
            g = self._gradient(values[-1], targets)
            total: Tensor | None = None
            for place in range(len(self._links) - 1, self._first - 1, -1):
                link = self._links[place]
                if link.book is not None:
                    norms = link.book.square_norms([(values[place], g)])
                    total = norms if total is None else total.add_(norms)
                if place == self._first:
                    break
                if link.weight is not None:
                    g = g @ link.weight
                elif link.backward is not None:
                    g = link.backward(g, values[place + 1])
            if total is None:
                raise AssertionError("a chain has a trainable link")
            return total, None

    def accumulate(self, factors: Tensor) -> None:
        for link in self._links:
            if link.book is not None:
                link.book.accumulate(factors)

    @property
    def can_stack(self) -> bool:
        """Whether `stacked` knows every trainable layer."""
        return all(link.book is None or isinstance(link.book, LinearBook) for link in self._links)

    def stacked(self, factors: Tensor) -> Tensor:
        """Return the weighted sums of several sets of rows that went through `square_norms` as one.

        Args:
            factors: shape (sets, rows of each).

        Returns:
            Shape (sets, dimension), each row laid out as the layers' views are.
        """
        books = [link.book for link in self._links if isinstance(link.book, LinearBook)]
        dimension = sum(view.numel() for book in books for view in book.views.values())
        sums = factors.new_zeros(len(factors), dimension)
        for book in books:
            book.stacked(factors, sums)
        return sums
