"""One class per layer type: each example's norm, then the weighted sum, from inputs and output gradients.

For every layer that is linear in its parameters, example b's gradient is a function of the layer's input a_b
and of the gradient g_b at its output. So the squared norm is found without a backward pass to the parameters
("ghost norm"), and the sum of scaled gradients is one matrix product in which row b carries its clipping
factor. A layer that is called several times in one forward pass has its calls laid side by side as further
positions.

Notation: B examples, T positions (time, pixels), layer input width D, output width E.

Source: Goodfellow 2015 (norms); Li et al. 2022 (sequences); Bu et al. 2023, "Differentially Private
Optimization on Large Model at Small Cost" (book-keeping).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clients.dp.errors import UnsupportedModelError

_GUARD = {torch.float64: 2.0**-40, torch.float32: 2.0**-22}
"""A Gram matrix may cancel: this share of its Cauchy-Schwarz bound is added: no norm is understated."""


class LayerBook:
    """What one layer remembers of a forward pass; `square_norms` then `accumulate`, once each a pass.

    `positions` are (input, output gradient) pairs, one for each call of the layer.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.views: dict[str, Tensor] = {}
        self.invalid: Tensor | None = None  # bool (B,): rows this layer cannot even look up

    def forward(self, x: Tensor, *rest: Any) -> tuple[Tensor, Any]:
        """Return the layer's output and what must be kept of its input."""
        raise NotImplementedError

    def square_norms(self, calls: list[tuple[Any, Tensor]]) -> Tensor:
        """Return squared L2 norms of the examples' gradients for this layer's parameters, shape (B,)."""
        raise NotImplementedError

    def accumulate(self, factors: Tensor) -> None:
        """Add sum_b factors_b * gradient_b to `views`, the slices of the result."""
        raise NotImplementedError


class _MatrixBook(LayerBook):
    """A weight of shape (E, D) applied at each of T positions; T = 1 needs no matrix per example."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.weight: Tensor = module.weight  # type: ignore[assignment]
        self.bias: Tensor | None = module.bias  # type: ignore[assignment]
        self._flat: tuple[Tensor, Tensor] | None = None
        self._sequence: tuple[Tensor, Tensor] | None = None
        self._per_example: Tensor | None = None
        self._bias_gradients: Tensor | None = None

    def _flat_norms(self, x: Tensor, g: Tensor) -> Tensor:
        self._flat = (x, g)
        norms = _square_norms(x)
        if self.bias is not None:
            norms += 1.0
        norms *= _square_norms(g)
        self._bias_gradients = g
        return norms

    def _sequence_norms(self, x: Tensor, g: Tensor) -> Tensor:
        """x: (B, T, D), g: (B, T, E)."""
        length, width_in, width_out = x.shape[1], x.shape[2], g.shape[2]
        self._flat = None
        if length * (width_in + width_out) < width_in * width_out:
            self._sequence, self._per_example = (x, g), None
            gram_x, gram_g = torch.bmm(x, x.mT), torch.bmm(g, g.mT)
            norms = (gram_x * gram_g).sum((1, 2)).clamp_(min=0)
            norms += _GUARD[x.dtype] * _trace(gram_x) * _trace(gram_g)
        else:
            self._sequence, self._per_example = None, torch.bmm(g.mT, x).flatten(1)
            norms = _square_norms(self._per_example)
        if self.bias is not None:
            self._bias_gradients = g.sum(1)
            norms = norms + _square_norms(self._bias_gradients)
        return norms

    def _add_weight(self, gradient: Tensor) -> None:
        """Add a gradient of shape (E, D) in the order of `_sequence_norms`."""
        self.views["weight"] += gradient

    def accumulate(self, factors: Tensor) -> None:
        weight = self.views["weight"]
        if self._flat is not None:
            x, g = self._flat
            weight.addmm_((g * factors[:, None]).t(), x)
        elif self._per_example is not None:
            self._add_weight((factors @ self._per_example).view(len(weight), -1))
        elif self._sequence is not None:
            x, g = self._sequence
            self._add_weight((g * factors[:, None, None]).flatten(0, 1).t() @ x.flatten(0, 1))
        if self.bias is not None and self._bias_gradients is not None:
            self.views["bias"].addmv_(self._bias_gradients.t(), factors)
        self._flat = self._sequence = self._per_example = self._bias_gradients = None


class LinearBook(_MatrixBook):
    def apply(self, x: Tensor) -> Tensor:
        """Return the layer's output alone."""
        return functional.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.linear(x, self.weight, self.bias), x

    def square_norms(self, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
        x, g = calls[0]
        if len(calls) == 1 and x.dim() == 2:
            return self._flat_norms(x, g)
        return self._sequence_norms(
            _side_by_side([_positions(x) for x, _ in calls]), _side_by_side([_positions(g) for _, g in calls])
        )

    def stacked(self, factors: Tensor, sums: Tensor) -> None:
        """In place of `accumulate`: write the sum of each set of rows into its line of `sums`, where `views`
        has its slices. `factors`: shape (sets, rows of each); a product of its own for each set.
        """
        if self._flat is None:
            raise AssertionError("rows of one position were taken first")
        x, g = (part.view(*factors.shape, -1) for part in self._flat)
        _slice_of(sums, self.views["weight"]).copy_(torch.bmm((g * factors[:, :, None]).mT, x).flatten(1))
        if self.bias is not None:
            _slice_of(sums, self.views["bias"]).copy_(torch.bmm(factors[:, None], g)[:, 0])
        self._flat = self._bias_gradients = None


class ConvBook(_MatrixBook):
    """Conv1d and Conv2d, groups = 1, zero padding: a linear map of unfolded patches, T = output pixels."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__(module)
        self._one_dimensional = isinstance(module, nn.Conv1d)
        padding = module.padding
        if isinstance(padding, str):
            spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            padding = tuple(0 if padding == "valid" else span // 2 for span in spans)
        lead = ((0,), (1,)) if self._one_dimensional else ((), ())
        self._padding = (*lead[0], *padding)
        self._kernel = (*lead[1], *module.kernel_size)
        self._stride = (*lead[1], *module.stride)
        self._dilation = (*lead[1], *module.dilation)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._one_dimensional:
            out = functional.conv2d(
                x.unsqueeze(2),
                self.weight.unsqueeze(2),
                self.bias,
                self._stride,
                self._padding,
                self._dilation,
            )
            return out.squeeze(2), x
        return functional.conv2d(x, self.weight, self.bias, self._stride, self._padding, self._dilation), x

    def square_norms(self, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
        x = _side_by_side([self._patches(x) for x, _ in calls])
        g = _side_by_side([g.flatten(2).mT for _, g in calls])
        return self._sequence_norms(x, g)

    def _patches(self, x: Tensor) -> Tensor:
        """Return (B, T, D), D = kernel pixels * channels, channels last: far faster to copy than `unfold`."""
        image = x.unsqueeze(2) if self._one_dimensional else x
        down, across = self._padding
        padded = functional.pad(image, (across, across, down, down)).permute(0, 2, 3, 1).contiguous()
        rows, height, width, channels = padded.shape
        sizes = [
            (length - dilation * (kernel - 1) - 1) // stride + 1
            for length, kernel, stride, dilation in zip(
                (height, width), self._kernel, self._stride, self._dilation, strict=True
            )
        ]
        per_row, per_line, per_pixel, one = padded.stride()
        steps = (self._stride[0] * per_line, self._stride[1] * per_pixel)
        kernel_steps = (self._dilation[0] * per_line, self._dilation[1] * per_pixel)
        patches = padded.as_strided(
            (rows, *sizes, *self._kernel, channels), (per_row, *steps, *kernel_steps, one)
        )
        return patches.reshape(rows, sizes[0] * sizes[1], -1)

    def _add_weight(self, gradient: Tensor) -> None:
        view = self.views["weight"]
        down, across = self._kernel
        view += gradient.view(len(view), down, across, -1).permute(0, 3, 1, 2).reshape(view.shape)


class EmbeddingBook(LayerBook):
    """Rows of a table picked by integer codes; an example's gradient is non-zero on the rows it picked."""

    module: nn.Embedding

    def __init__(self, module: nn.Embedding) -> None:
        super().__init__(module)
        self._weight = module.weight
        self._count = module.num_embeddings
        self._padding = module.padding_idx
        self._kept: tuple[Tensor, Tensor] | None = None

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        codes = codes.long()
        low, high = torch.aminmax(codes)
        if low < 0 or high >= self._count:
            inside = (codes >= 0) & (codes < self._count)
            row_invalid = ~inside.flatten(1).all(1)
            self.invalid = row_invalid if self.invalid is None else self.invalid | row_invalid
            codes = torch.where(inside, codes, 0)
        return functional.embedding(codes, self._weight), codes

    def square_norms(self, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
        codes = _side_by_side([codes.flatten(1) for codes, _ in calls])
        g = _side_by_side([g.reshape(g.shape[0], -1, g.shape[-1]) for _, g in calls])
        if self._padding is not None:
            g = g * (codes != self._padding)[:, :, None]
        self._kept = (codes, g)
        if codes.shape[1] == 1:
            return _square_norms(g.flatten(1))
        gram = torch.bmm(g, g.mT)
        same: Tensor = codes[:, :, None] == codes[:, None, :]
        norms: Tensor = (gram * same).sum((1, 2)).clamp_(min=0)
        return norms + _GUARD[g.dtype] * codes.shape[1] * _trace(gram)

    def accumulate(self, factors: Tensor) -> None:
        if self._kept is not None:
            codes, g = self._kept
            self.views["weight"].index_add_(0, codes.flatten(), (g * factors[:, None, None]).flatten(0, 1))
        self._kept = None


class _VectorBook(LayerBook):
    """A few numbers per example, small enough to write down: scales, shifts, intercepts."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._gradients: dict[str, Tensor] = {}

    def gradients(self, kept: Any, g: Tensor) -> dict[str, Tensor]:
        """Return for each parameter the examples' gradients, shape (B, parameter size)."""
        raise NotImplementedError

    def square_norms(self, calls: list[tuple[Any, Tensor]]) -> Tensor:
        total = self.gradients(*calls[0])
        for kept, g in calls[1:]:
            more = self.gradients(kept, g)
            total = {name: value + more[name] for name, value in total.items()}
        self._gradients = total
        norms = [_square_norms(value) for value in total.values()]
        return norms[0] if len(norms) == 1 else torch.stack(norms).sum(0)

    def accumulate(self, factors: Tensor) -> None:
        for name, value in self._gradients.items():
            self.views[name].view(-1).addmv_(value.t(), factors)
        self._gradients = {}


class LayerNormBook(_VectorBook):
    module: nn.LayerNorm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        module = self.module
        out, mean, inverse_std = torch.native_layer_norm(
            x, list(module.normalized_shape), module.weight, module.bias, module.eps
        )
        with torch.no_grad():
            normal = (x.detach() - mean) * inverse_std
        return out, normal

    def gradients(self, kept: Tensor, g: Tensor) -> dict[str, Tensor]:
        shape = (g.shape[0], -1, self.views["weight"].numel())
        scale, shift = (g * kept).reshape(shape).sum(1), g.reshape(shape).sum(1)
        return {"weight": scale, "bias": shift} if "bias" in self.views else {"weight": scale}


class GroupNormBook(_VectorBook):
    module: nn.GroupNorm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        module = self.module
        out = functional.group_norm(x, module.num_groups, module.weight, module.bias, module.eps)
        with torch.no_grad():
            normal = functional.group_norm(x.detach(), module.num_groups, None, None, module.eps)
        return out, normal

    def gradients(self, kept: Tensor, g: Tensor) -> dict[str, Tensor]:
        shape = (g.shape[0], g.shape[1], -1)
        return {"weight": (g * kept).reshape(shape).sum(2), "bias": g.reshape(shape).sum(2)}


class SiteInterceptBook(_VectorBook):
    """One row of a (sites, outputs) table added to every example; the other rows' gradients are zero.

    `module.site` is this site's row. Without one the mean row is added, and every row's gradient is g /
    sites.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._weight: Tensor = module.weight  # type: ignore[assignment]
        self._site: int | None = module.site  # type: ignore[assignment]

    def apply(self, x: Tensor) -> Tensor:
        """Return the layer's output alone."""
        return x + (self._weight.mean(0) if self._site is None else self._weight[self._site])

    def forward(self, x: Tensor, site: object = None) -> tuple[Tensor, None]:
        if site is not None:
            raise UnsupportedModelError(
                "SiteIntercept", "set its `site`; a site given per call is for prediction"
            )
        return self.apply(x), None

    def gradients(self, kept: None, g: Tensor) -> dict[str, Tensor]:
        sites, width = self.views["weight"].shape
        total = g.reshape(g.shape[0], -1, width).sum(1)
        if self._site is None:
            return {"weight": (total / sites).repeat(1, sites)}
        table = g.new_zeros(g.shape[0], sites, width)
        table[:, self._site] = total
        return {"weight": table.flatten(1)}


def book_of(module: nn.Module) -> LayerBook | None:
    """Return the book for a layer we know in this configuration, else None."""
    kind = type(module)
    if kind is nn.Linear:
        return LinearBook(module)
    if isinstance(module, nn.Conv1d | nn.Conv2d) and kind in (nn.Conv1d, nn.Conv2d):
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        lopsided = module.padding == "same" and any(span % 2 for span in spans)
        known = module.groups == 1 and module.padding_mode == "zeros" and not lopsided
        return ConvBook(module) if known else None
    if isinstance(module, nn.Embedding) and kind is nn.Embedding:
        known = module.max_norm is None and not module.scale_grad_by_freq
        return EmbeddingBook(module) if known else None
    if kind is nn.LayerNorm:
        return LayerNormBook(module)
    if kind is nn.GroupNorm:
        return GroupNormBook(module)
    if kind.__name__ == "SiteIntercept" and hasattr(module, "site") and hasattr(module, "weight"):
        return SiteInterceptBook(module)
    return None


def refuse_in_place(model: nn.Module) -> None:
    """Turn off in-place activations, which would overwrite the outputs that gradients are taken at."""
    for module in model.modules():
        if hasattr(module, "inplace"):
            setattr(module, "inplace", False)  # noqa: B010  its type is known to no stub


def _side_by_side(calls: list[Tensor]) -> Tensor:
    return calls[0] if len(calls) == 1 else torch.cat(calls, dim=1)


def _slice_of(sums: Tensor, view: Tensor) -> Tensor:
    start = int(view.storage_offset())
    return sums[:, start : start + view.numel()]


def _positions(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def _square_norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square_()


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)
