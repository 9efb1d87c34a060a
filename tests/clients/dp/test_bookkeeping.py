"""The fast sum against two slow ones, then everything that must not pass or must not matter."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clients.dp.bookkeeping import BookPass, ClippedGradient
from clients.dp.chain import ChainPass
from clients.dp.errors import ShapeError, TermsError, UnsupportedModelError


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("share", [1e-3, 1.0, 1e3], ids=["all clipped", "half clipped", "none clipped"])
def test_sum_equals_vmap(case_of, vmap_gradients, clip_and_sum, dtype, share):
    case = case_of(dtype)
    rows = vmap_gradients(case.model, case.inputs, case.targets, cross_entropy)
    norm = share * float(rows.norm(dim=1).median())
    expected = clip_and_sum(rows, norm)
    found = ClippedGradient(case.model, norm, "cross_entropy")(case.inputs, case.targets)
    assert found.dtype == dtype
    assert (found - expected).norm() <= (1e-9 if dtype == torch.float64 else 1e-5) * expected.norm()


@pytest.mark.parametrize("name", ["mlp", "cnn", "embedding, layer norm", "transformer of linears"])
@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing"
)  # opacus's own, when inputs ask for no gradient
def test_sum_equals_opacus(zoo, clip_and_sum, rng, name):
    from opacus import GradSampleModule

    make, shape, codes = zoo[name]
    model = make().double()
    inputs = (
        torch.randint(0, 7, (23, *shape), generator=rng)
        if codes
        else torch.randn((23, *shape), generator=rng).double()
    )
    targets = torch.randint(0, 3, (23,), generator=rng)
    fast = ClippedGradient(model, 0.5, "cross_entropy")(inputs, targets)
    if name == "mlp":
        model[1].inplace = False  # opacus cannot hook it
    wrapped = GradSampleModule(model, loss_reduction="sum")
    cross_entropy(wrapped(inputs), targets).backward()
    rows = torch.cat([value.grad_sample.flatten(1) for value in model.parameters()], dim=1)
    assert torch.allclose(fast, clip_and_sum(rows, 0.5), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["binary_cross_entropy", "squared_error"])
@pytest.mark.parametrize("target_shape", [(23,), (23, 1)], ids=str)
def test_other_losses_equal_vmap(vmap_gradients, clip_and_sum, rng, loss, target_shape):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    inputs, targets = (
        torch.randn(23, 6, generator=rng).double(),
        torch.rand(target_shape, generator=rng).double(),
    )
    row_loss = {
        "binary_cross_entropy": lambda z, y: functional.binary_cross_entropy_with_logits(
            z.flatten(), y.flatten()
        ),
        "squared_error": lambda z, y: 0.5 * ((z.flatten() - y.flatten()) ** 2).sum(),
    }[loss]
    rows = vmap_gradients(model, inputs, targets, row_loss)
    norm = float(rows.norm(dim=1).median())
    found = ClippedGradient(model, norm, loss)(inputs, targets)
    assert torch.allclose(found, clip_and_sum(rows, norm), rtol=1e-10)


def test_whole_number_labels_serve_a_binary_loss(rng):
    model, inputs = nn.Linear(4, 1).double(), torch.randn(9, 4, generator=rng).double()
    labels = torch.randint(0, 2, (9,), generator=rng)
    engine = ClippedGradient(model, 1.0, "binary_cross_entropy")
    assert torch.equal(engine(inputs, labels), engine(inputs, labels.double()))


def test_known_models_never_touch_the_hooks(case_of):
    case = case_of(torch.float64)
    assert isinstance(ClippedGradient(case.model, 1.0, "cross_entropy")._pass, (BookPass, ChainPass)) != (
        "hooks" in case.name
    )


def test_importing_the_engine_loads_neither_opacus_nor_flower():
    code = "import clients.dp.mechanism, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "torch" in loaded
    assert not {"opacus", "flwr", "pandas"} & set(loaded)


def test_each_row_moves_the_sum_by_at_most_the_norm(case_of):
    case = case_of(torch.float64)
    engine = ClippedGradient(case.model, 0.01, "cross_entropy")
    whole = engine(case.inputs, case.targets)
    for row in range(0, 23, 5):
        others = torch.arange(23) != row
        assert (whole - engine(case.inputs[others], case.targets[others])).norm() <= 0.01 * (1 + 1e-9)


def test_masked_rows_and_chunks_and_order_change_nothing(case_of):
    case = case_of(torch.float64)
    engine = ClippedGradient(case.model, 0.5, "cross_entropy")
    mask = torch.arange(23) % 3 != 0
    kept = engine(case.inputs[mask], case.targets[mask])
    small = ClippedGradient(case.model, 0.5, "cross_entropy", chunk_rows=4)
    back = torch.arange(22, -1, -1)
    assert torch.allclose(engine(case.inputs, case.targets, mask), kept, rtol=1e-10, atol=1e-13)
    assert torch.allclose(small(case.inputs, case.targets, mask), kept, rtol=1e-10, atol=1e-13)
    assert torch.allclose(
        engine(case.inputs[back], case.targets[back], mask[back].double()), kept, rtol=1e-10, atol=1e-13
    )


def test_no_rows_give_zero(case_of):
    case = case_of(torch.float64)
    engine = ClippedGradient(case.model, 0.5, "cross_entropy")
    assert torch.equal(engine(case.inputs[:0], case.targets[:0]), torch.zeros(engine.dimension).double())
    nobody = torch.zeros(23, dtype=torch.bool)
    assert not engine(case.inputs, case.targets, nobody).any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e200, 1e308])
def test_a_row_that_is_not_finite_or_overflows_contributes_zero(rng, poison):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    inputs, targets = torch.randn(12, 6, generator=rng).double(), torch.randint(0, 3, (12,), generator=rng)
    engine = ClippedGradient(model, 0.5, "cross_entropy")
    good = torch.arange(12) != 4
    expected = engine(inputs[good], targets[good])
    inputs[4, 2] = poison
    found = engine(inputs, targets)
    assert torch.isfinite(found).all()
    if math.isfinite(poison):
        assert (found - expected).norm() <= 0.5 * (1 + 1e-9)
    else:
        assert torch.equal(found, expected)


def test_a_laundered_nan_is_found_at_the_input(rng):
    """A model that repairs NaN inside must not turn a malformed row into a contribution."""

    class Repair(nn.Module):
        def forward(self, x):
            return torch.nan_to_num(x)

    model = nn.Sequential(Repair(), nn.Linear(6, 3)).double()
    inputs, targets = torch.randn(5, 6, generator=rng).double(), torch.zeros(5, dtype=torch.int64)
    engine = ClippedGradient(model, 0.5, "cross_entropy")
    expected = engine(inputs[1:], targets[1:])
    inputs[0, 0] = math.nan
    assert torch.allclose(engine(inputs, targets), expected, rtol=1e-12)


@pytest.mark.parametrize("label", [-1, 3, 2**62, -(2**63)])
def test_a_label_outside_the_classes_contributes_zero(rng, label):
    model = nn.Linear(6, 3).double()
    inputs, targets = torch.randn(5, 6, generator=rng).double(), torch.zeros(5, dtype=torch.int64)
    engine = ClippedGradient(model, 0.5, "cross_entropy")
    expected = engine(inputs[1:], targets[1:])
    targets[0] = label
    assert torch.allclose(engine(inputs, targets), expected, rtol=1e-12)


@pytest.mark.parametrize("label", [math.nan, math.inf])
@pytest.mark.parametrize("loss", ["binary_cross_entropy", "squared_error"])
def test_a_label_that_is_not_finite_contributes_zero(rng, label, loss):
    model = nn.Linear(6, 1).double()
    inputs, targets = torch.randn(5, 6, generator=rng).double(), torch.rand(5, generator=rng).double()
    engine = ClippedGradient(model, 0.5, loss)
    expected = engine(inputs[1:], targets[1:])
    targets[0] = label
    assert torch.allclose(engine(inputs, targets), expected, rtol=1e-12)


@pytest.mark.parametrize("code", [-1, 7, 2**40])
def test_a_code_outside_the_table_contributes_zero(zoo, rng, code):
    model = zoo["embedding, layer norm"][0]().double()
    inputs, targets = torch.randint(0, 7, (6, 9), generator=rng), torch.randint(0, 3, (6,), generator=rng)
    engine = ClippedGradient(model, 0.5, "cross_entropy")
    expected = engine(inputs[1:], targets[1:])
    inputs[0, 4] = code
    assert torch.allclose(engine(inputs, targets), expected, rtol=1e-12)


def test_only_bad_rows_give_zero(rng):
    engine = ClippedGradient(nn.Linear(6, 3).double(), 0.5, "cross_entropy")
    inputs = torch.full((4, 6), math.nan).double()
    assert not engine(inputs, torch.zeros(4, dtype=torch.int64)).any()


def test_weights_that_are_not_finite_give_zero_not_an_error(rng):
    model = nn.Linear(6, 3).double()
    engine = ClippedGradient(model, 0.5, "cross_entropy")
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    assert not engine(torch.randn(4, 6, generator=rng).double(), torch.zeros(4, dtype=torch.int64)).any()


def test_a_gradient_that_cancels_over_positions_is_not_understated():
    """Opposite gradients at two positions: the Gram form cancels to noise; clipping must not trust it."""

    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(40, 40, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x.reshape(len(x), 2, 40))
            return (h[:, 0] - h[:, 1]).sum(1, keepdim=True)

    model = Difference().double()
    engine = ClippedGradient(model, 1.0, "squared_error")
    half = torch.full((1, 40), 1e6).double()
    inputs = torch.cat([half, half * (1 + 1e-9)], dim=1)
    found = engine(inputs, torch.full((1, 1), 5.0).double())
    assert found.norm() <= 1 + 1e-6


def test_changed_weights_are_seen(rng):
    model = nn.Linear(6, 3).double()
    engine = ClippedGradient(model, 0.5, "cross_entropy")
    inputs, targets = torch.randn(8, 6, generator=rng).double(), torch.randint(0, 3, (8,), generator=rng)
    before = engine(inputs, targets)
    with torch.no_grad():
        model.weight[0].add_(1.0)  # all rows alike would leave the softmax as it was
    after = engine(inputs, targets)
    assert not torch.equal(before, after)
    assert torch.equal(after, ClippedGradient(model, 0.5, "cross_entropy")(inputs, targets))


def test_the_callers_model_is_left_as_it_was(rng):
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU(inplace=True)).double()
    ClippedGradient(model, 0.5, "cross_entropy")(
        torch.randn(8, 6).double(), torch.zeros(8, dtype=torch.int64)
    )
    assert model[1].inplace
    assert all(value.requires_grad and value.grad is None for value in model.parameters())
    assert not model[0]._forward_hooks
    assert model(torch.randn(2, 6).double()).requires_grad


def test_frozen_layers_are_no_part_of_the_sum(rng):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    model[0].requires_grad_(False)
    engine = ClippedGradient(model, 0.5, "cross_entropy")
    assert engine.dimension == 27
    assert engine(torch.randn(5, 6, generator=rng).double(), torch.zeros(5, dtype=torch.int64)).shape == (27,)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class RowsMixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x - x.mean(0))


class BatchAxisMoved(nn.Module):
    """(rows, 5 positions) becomes (5, rows): right shape at the end, wrong axis in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.reshape(len(x), 5, 2).transpose(0, 1)).sum(0)


class ChangedInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(torch.tanh(self.a(x))).tanh_())


class WeightUsedTwice(nn.Module):
    """The layer is called, and its weight is also read directly, behind the layer's back."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) @ self.a.weight


@pytest.mark.parametrize(
    ("model", "width"),
    [
        (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), 6),
        (nn.Sequential(nn.Unflatten(1, (1, 6)), nn.MultiheadAttention(6, 2), nn.Flatten()), 6),
        (nn.LSTM(6, 3), 6),
        (Tied(), 6),
        (RowsMixed(), 6),
        (BatchAxisMoved(), 10),
        (ChangedInPlace(), 6),
        (WeightUsedTwice(), 6),
        (nn.Sequential(nn.Linear(7, 3)), 6),
        (nn.Sequential(nn.Linear(6, 3), nn.Flatten(0), nn.Unflatten(0, (-1, 1))), 6),
        (nn.Sequential(nn.ReLU()), 6),
        (nn.Linear(6, 3, dtype=torch.float16), 6),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_model_without_rows_of_its_own_is_refused(model, width, rng):
    with pytest.raises(UnsupportedModelError):
        ClippedGradient(model, 1.0, "cross_entropy")(
            torch.rand(4, width, generator=rng), torch.zeros(4, dtype=torch.int64)
        )


def test_the_refusal_depends_on_shapes_not_on_rows(rng):
    engine = ClippedGradient(RowsMixed(), 1.0, "cross_entropy")
    for rows in (torch.zeros(0, 6), torch.zeros(1, 6), torch.full((4, 6), math.nan)):
        with pytest.raises(UnsupportedModelError):
            engine(rows, torch.zeros(len(rows), dtype=torch.int64))


@pytest.mark.parametrize("norm", [0, -1, math.nan, math.inf])
def test_a_clipping_norm_out_of_range_is_refused(norm):
    with pytest.raises(TermsError, match="max_grad_norm"):
        ClippedGradient(nn.Linear(2, 2), norm, "cross_entropy")


def test_an_unknown_loss_is_refused():
    with pytest.raises(TermsError, match="loss"):
        ClippedGradient(nn.Linear(2, 2), 1.0, "hinge")


def test_arguments_that_do_not_fit_are_named():
    engine = ClippedGradient(nn.Linear(2, 2), 1.0, "cross_entropy")
    rows, labels = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    engine(rows, labels)
    for bad, field in [
        ((rows.double(), labels), "inputs"),
        ((torch.zeros(4, 3), labels), "inputs"),
        ((rows, labels[:3]), "targets"),
        ((rows, labels, torch.ones(3)), "mask"),
    ]:
        with pytest.raises(ShapeError, match=field):
            engine(*bad)


def many_sets(rng, sizes, width=6, classes=3):
    return [
        (torch.randn(rows, width, generator=rng).double(), torch.randint(0, classes, (rows,), generator=rng))
        for rows in sizes
    ]


@pytest.mark.parametrize("bias", [True, False])
def test_sums_of_many_are_those_of_each_alone(rng, bias):
    model = nn.Sequential(nn.Linear(6, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias)).double()
    engine = ClippedGradient(model, 0.3, "cross_entropy")
    sets = many_sets(rng, [1, 40, 64, 65, 200, 3, 1024])
    alone = [engine(*rows) for rows in sets]
    found = engine.of_many(sets)
    for one, other in zip(alone, found, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)
    assert torch.equal(engine(*sets[1]), alone[1])  # and a call is as it was


def test_a_set_with_an_unusable_row_is_left_to_a_call_and_spoils_no_other(rng):
    engine = ClippedGradient(nn.Linear(6, 3).double(), 0.3, "cross_entropy")
    sets = many_sets(rng, [5, 5, 5, 5])
    engine(*sets[0])
    sets[1][0][2, 3], sets[2][1][4], sets[3][0][0, 0] = math.nan, 7, math.inf
    first, *others = engine.of_many(sets)
    assert torch.allclose(first, engine(*sets[0]), rtol=0, atol=1e-12)
    assert others == [None, None, None]


def test_what_does_not_fit_one_pass_is_left_to_calls(rng):
    fresh = ClippedGradient(nn.Linear(6, 3).double(), 0.3, "cross_entropy")
    sets = many_sets(rng, [5, 7])
    assert fresh.of_many(sets) == [None, None]  # not compared with the definition yet
    fresh(*sets[0])
    odd = [
        (sets[0][0][:0], sets[0][1][:0]),
        (sets[0][0].float(), sets[0][1]),
        (sets[0][0][:, :4], sets[0][1]),
        (sets[0][0], sets[0][1][:4]),
        many_sets(rng, [1025])[0],
    ]
    assert fresh.of_many(odd) == [None] * 5
    normed = ClippedGradient(nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3)).double(), 0.3, "cross_entropy")
    normed(*sets[0])
    assert normed.of_many(sets) == [None, None]
