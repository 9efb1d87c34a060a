"""The sum of clipped per-example gradients, without ever holding one gradient per example.

`ClippedGradient(model, max_grad_norm, loss)` reads the model once and keeps a plan. Each call runs one
forward pass, one backward pass to the layers' outputs only, takes each example's norm from what the layers
saw, and adds the scaled gradients with one matrix product a layer (`layers`). A model with other trainable
layers goes through Opacus's per-sample hooks (`hooks`). Before the first use the engine is compared, on
made-up rows, with the definition: one row at a time, ordinary autograd, clip, add. A model that mixes rows,
moves the batch axis or ties weights is refused there, whatever the data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from clients.dp.chain import ChainPass, links_of
from clients.dp.errors import ShapeError, TermsError, UnsupportedModelError
from clients.dp.grid import Precision
from clients.dp.layers import LayerBook, book_of, refuse_in_place
from clients.dp.losses import OUTPUT_GRADIENTS, Loss, OutputGradient
from clients.dp.selfcheck import check_against_definition

CHUNK_ROWS = 1024
_LEAST_ROWS = 64
"""Fewest rows in a pass. Matrix libraries take other kernels for a handful of rows, which round otherwise:
the gradients of three rows would change when a fourth leaves, and weights can be chosen to magnify that."""

_STACKED_ROWS, _STACKED_NUMBERS = 1 << 13, 1 << 21  # rows, and numbers in their sums, of one pass for many

_MIXING = (nn.modules.batchnorm._BatchNorm, nn.MultiheadAttention, nn.RNNBase)
_PRECISIONS: dict[torch.dtype, Precision] = {torch.float64: "float64", torch.float32: "float32"}


class Pass(Protocol):
    """One way to get norms and weighted sums: `square_norms` runs the model, `accumulate` fills the views."""

    def square_norms(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return squared norms (B,) and, if any row could not be read at all, a bool (B,) naming these."""

    def accumulate(self, factors: Tensor) -> None: ...


class ClippedGradient:
    """Sum of clipped per-example gradients of one model; not safe to share between threads.

    The model's parameters are shared by storage: change them in place (optimisers, `load_state_dict` and
    `copy_` do).

    Args:
        model: takes one tensor whose first axis is the batch; parameters all float64 or all float32.
        max_grad_norm: C > 0, the largest L2 norm of one row's contribution.
        loss: which loss the rows are scored by.
        chunk_rows: rows per pass; bounds memory, does not change the result beyond rounding.
        self_check: compare with the definition before first use.
    """

    def __init__(
        self,
        model: nn.Module,
        max_grad_norm: float,
        loss: Loss,
        *,
        chunk_rows: int = CHUNK_ROWS,
        self_check: bool = True,
    ) -> None:
        if not (max_grad_norm > 0 and math.isfinite(max_grad_norm)):
            raise TermsError("max_grad_norm", max_grad_norm, "give a positive number")
        if loss not in OUTPUT_GRADIENTS:
            raise TermsError("loss", loss, f"give one of {', '.join(OUTPUT_GRADIENTS)}")
        self.model, self.max_grad_norm, self.loss = model, float(max_grad_norm), loss
        self._chunk_rows = chunk_rows
        trainable = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        self.dtype, self.precision = _precision_of(trainable)
        self.dimension = sum(value.numel() for _, value in trainable)
        self._flat = torch.zeros(self.dimension, dtype=self.dtype)
        offsets = torch.tensor([0, *(value.numel() for _, value in trainable)]).cumsum(0).tolist()
        self._views = {
            name: self._flat[start : start + value.numel()].view(value.shape)
            for start, (name, value) in zip(offsets, trainable, strict=False)
        }
        self._pass = _plan(model, self._views, loss)
        self._row_shape: tuple[int, ...] | None = None
        self._checked = not self_check

    def __call__(self, inputs: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the sum over rows of gradient * min(1, C / norm), flat, in `model.parameters()` order.

        Args:
            inputs: shape (B, ...), the model's dtype or integer codes.
            targets: B of them, as the loss wants.
            mask: optional, shape (B,), bool or 0/1; a zero row contributes nothing.

        Returns:
            Shape (dimension,), the model's dtype. No rows give zeros. A row that is not finite, names an
            unknown code or class, or whose gradient is not finite contributes zero.

        Raises:
            ShapeError: the arguments do not fit each other or the first call.
            UnsupportedModelError: first call only, see the module.
        """
        self._check_shapes(inputs, targets, mask)
        if not self._checked:
            self.check(inputs)
        self._flat.zero_()
        for start in range(0, len(inputs), self._chunk_rows):
            rows = slice(start, start + self._chunk_rows)
            self._add(inputs[rows], targets[rows], None if mask is None else mask[rows])
        return self._flat.clone()

    def of_many(self, sets: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
        """Return what a call with each (inputs, targets) would, in one pass; None where it takes a call.

        A row's gradient is a function of that row and the weights, and a sum one of its own set: nothing of
        another set enters. Sets are filled up to a multiple of `_LEAST_ROWS`, so that one more row does not
        change the pass. Only chains of Linear layers, that were checked, and sets that fit a pass.
        """
        found: list[Tensor | None] = [None] * len(sets)
        if not (self._checked and isinstance(self._pass, ChainPass) and self._pass.can_stack):
            return found
        places: dict[tuple[int, torch.dtype], list[int]] = {}
        for place, (inputs, targets) in enumerate(sets):
            is_known = (
                inputs.dim() == 2 and (inputs.shape[1],) == self._row_shape and inputs.dtype == self.dtype
            )
            if is_known and 0 < len(inputs) <= self._chunk_rows and targets.shape == (len(inputs),):
                rows = -(-len(inputs) // _LEAST_ROWS) * _LEAST_ROWS
                places.setdefault((rows, targets.dtype), []).append(place)
        for (rows, _), fitting in places.items():
            most = max(1, min(_STACKED_ROWS // rows, _STACKED_NUMBERS // self.dimension))
            for start in range(0, len(fitting), most):
                taken = fitting[start : start + most]
                sums = self._stacked(self._pass, [sets[place] for place in taken], rows)
                for place, total in zip(taken, sums, strict=True):
                    found[place] = total
        return found

    def _stacked(self, way: ChainPass, sets: list[tuple[Tensor, Tensor]], rows: int) -> list[Tensor | None]:
        first = sets[0]
        inputs = first[0].new_zeros(len(sets), rows, first[0].shape[1])
        targets, live = first[1].new_zeros(len(sets), rows), first[0].new_zeros(len(sets), rows)
        for place, (x, y) in enumerate(sets):
            inputs[place, : len(x)], targets[place, : len(x)], live[place, : len(x)] = x, y, 1.0
        square_norms, _ = way.square_norms(inputs.flatten(0, 1), targets.flatten())
        with torch.no_grad():
            square_norms = square_norms.view(len(sets), rows)
            good = torch.isfinite(square_norms.sum(1) + inputs.sum((1, 2))).tolist()
            factors = (self.max_grad_norm * square_norms.rsqrt_()).clamp_(max=1.0) * live
            sums = way.stacked(factors)
        return [total if usable else None for total, usable in zip(sums, good, strict=True)]

    def check(self, like: Tensor) -> None:
        """Compare with the definition on made-up rows of `like`'s shape and type; its values are not read.

        Raises:
            UnsupportedModelError: they differ, or the model cannot run on such rows.
        """
        check_against_definition(self.model, self.loss, like, self._like)
        self._checked = True

    def _add(self, inputs: Tensor, targets: Tensor, mask: Tensor | None) -> None:
        if len(inputs) < _LEAST_ROWS:
            inputs, targets, mask = _filled_up(inputs, targets, mask)
        square_norms, unreadable = self._pass.square_norms(inputs, targets)
        with torch.no_grad():
            probe = square_norms.sum() + inputs.sum()
            if unreadable is not None or not math.isfinite(probe.item()):
                good = torch.isfinite(square_norms) & torch.isfinite(inputs).flatten(1).all(1)
                if unreadable is not None:
                    good &= ~unreadable
                if not good.all():
                    if good.any():
                        self._add(inputs[good], targets[good], None if mask is None else mask[good])
                    return
            factors = (self.max_grad_norm * square_norms.rsqrt_()).clamp_(max=1.0)
            if mask is not None:
                factors *= mask
            self._pass.accumulate(factors)

    def _check_shapes(self, inputs: Tensor, targets: Tensor, mask: Tensor | None) -> None:
        if self._row_shape is None and inputs.dim() > 0:
            self._row_shape = tuple(inputs.shape[1:])
        if inputs.dim() == 0 or tuple(inputs.shape[1:]) != self._row_shape:
            raise ShapeError("inputs", tuple(inputs.shape), f"(rows, *{self._row_shape})")
        if inputs.is_floating_point() and inputs.dtype != self.dtype:
            raise ShapeError("inputs", inputs.dtype, f"{self.dtype}, as the model")
        if len(targets) != len(inputs):
            raise ShapeError("targets", tuple(targets.shape), f"{len(inputs)} rows")
        if mask is not None and mask.shape != (len(inputs),):
            raise ShapeError("mask", tuple(mask.shape), (len(inputs),))

    def _like(self, model: nn.Module, max_grad_norm: float) -> ClippedGradient:
        return ClippedGradient(model, max_grad_norm, self.loss, self_check=False)


class BookPass:
    """Forward with the layers' calls written down, backward to their outputs, one book a layer."""

    def __init__(self, model: nn.Module, books: dict[nn.Module, LayerBook], gradient: OutputGradient) -> None:
        self._books = list(books.values())
        self._gradient = gradient
        self._tape: list[tuple[LayerBook, object, Tensor]] = []
        for module, book in books.items():
            module.forward = self._recorder(book)
        refuse_in_place(model)
        self._steps = _flatten(model)

    def _recorder(self, book: LayerBook) -> Callable[..., Tensor]:
        tape, forward = self._tape, book.forward

        def record(x: Tensor, *rest: object) -> Tensor:
            out, kept = forward(x, *rest)
            if not out.requires_grad:
                out.requires_grad_()
            tape.append((book, kept, out))
            return out

        return record

    def square_norms(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        self._tape.clear()
        with torch.enable_grad():
            outputs = inputs
            for step in self._steps:
                outputs = step(outputs)
        with torch.no_grad():
            start = self._gradient(outputs.detach(), targets)
        tape = self._tape
        gradients = torch.autograd.grad(outputs, [out for _, _, out in tape], start, allow_unused=True)
        with torch.no_grad():
            return self._norms(gradients), self._unreadable()

    def _norms(self, gradients: Iterable[Tensor | None]) -> Tensor:
        calls: dict[LayerBook, list[tuple[object, Tensor]]] = {}
        for (book, kept, out), gradient in zip(self._tape, gradients, strict=True):
            calls.setdefault(book, []).append((kept, torch.zeros_like(out) if gradient is None else gradient))
        total: Tensor | None = None
        for book, pairs in calls.items():
            norms = book.square_norms(pairs)
            total = norms if total is None else total.add_(norms)
        self._tape.clear()
        if total is None:
            raise UnsupportedModelError("model", "no trainable layer is reached by the forward pass")
        return total

    def _unreadable(self) -> Tensor | None:
        found = None
        for book in self._books:
            if book.invalid is not None:
                found = book.invalid if found is None else found | book.invalid
                book.invalid = None
        return found

    def accumulate(self, factors: Tensor) -> None:
        for book in self._books:
            book.accumulate(factors)


def _filled_up(inputs: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return `_LEAST_ROWS` rows: those given, then copies of the first one that count zero times."""
    rows = torch.arange(_LEAST_ROWS)
    real = rows < len(inputs)
    rows = torch.where(real, rows, 0)
    return inputs[rows], targets[rows], real if mask is None else real & mask[rows].bool()


def _plan(model: nn.Module, views: dict[str, Tensor], loss: Loss) -> Pass:
    for name, module in model.named_modules():
        if isinstance(module, _MIXING):
            raise UnsupportedModelError(
                f"{name or 'model'} ({type(module).__name__})",
                "has no gradient per row we can compute; use GroupNorm, LayerNorm or layers made of Linear",
            )
    seen: set[int] = set()
    for owner, module in model.named_modules():
        for name, value in module.named_parameters(recurse=False):
            if id(value) in seen:
                raise UnsupportedModelError(
                    f"{owner}.{name}", "is a parameter of another layer too; untie it"
                )
            seen.add(id(value))
    private = _private_copy(model)
    books: dict[nn.Module, LayerBook] = {}
    for path, module in private.named_modules():
        own = [(name, value) for name, value in module.named_parameters(recurse=False)]
        if not own:
            continue
        frozen = [name for name, _ in own if f"{path}.{name}".lstrip(".") not in views]
        if len(frozen) == len(own):
            continue
        book = None if frozen else book_of(module)
        if book is None:
            from clients.dp.hooks import HookPass

            return HookPass(model, views, OUTPUT_GRADIENTS[loss])
        book.views = {name: views[f"{path}.{name}".lstrip(".")] for name, _ in own}
        books[module] = book
    links = links_of(_flatten(private), books)
    if links is not None:
        return ChainPass(links, OUTPUT_GRADIENTS[loss])
    return BookPass(private, books, OUTPUT_GRADIENTS[loss])


def _private_copy(model: nn.Module) -> nn.Module:
    """Return other modules over the same storage, whose parameters ask for no gradient."""
    memo: dict[int, object] = {
        id(value): nn.Parameter(value.detach(), requires_grad=False) for value in model.parameters()
    }
    memo |= {id(value): value for value in model.buffers()}
    return copy.deepcopy(model, memo)


def _flatten(model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    hooked = model._forward_hooks or model._forward_pre_hooks
    chained = type(model).forward is nn.Sequential.forward or type(model).__name__ == "LayerModel"
    if hooked or not (isinstance(model, nn.Sequential) and chained):
        return [model]
    return [step for module in model for step in _flatten(module)]


def _precision_of(trainable: list[tuple[str, nn.Parameter]]) -> tuple[torch.dtype, Precision]:
    if not trainable:
        raise UnsupportedModelError("model", "has no trainable parameter")
    dtype = trainable[0][1].dtype
    for name, value in trainable:
        if value.dtype != dtype or value.dtype not in _PRECISIONS:
            raise UnsupportedModelError(name, f"is {value.dtype}: make all of them float64 or all float32")
        if value.device.type != "cpu":
            raise UnsupportedModelError(name, f"is on {value.device}: move the model to the CPU")
    return dtype, _PRECISIONS[dtype]
