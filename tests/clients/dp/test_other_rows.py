"""A row's gradient is its own: how many rows share the pass changes nothing, even under hostile weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from clients.dp.bookkeeping import ClippedGradient
from clients.dp.grid import sensitivity_grid
from federation.mechanism import release_event

MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "softmax": lambda: nn.Sequential(nn.Linear(30, 2)),
    "mlp": lambda: nn.Sequential(nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 2)),
}


def make_hostile(model: nn.Sequential, row: torch.Tensor, generator: torch.Generator) -> None:
    """Give the first layer weights that cancel on `row`: what is left is rounding, then times 10**19."""
    with torch.no_grad():
        weight = torch.randn(row.shape, generator=generator, dtype=row.dtype)
        weight -= (weight @ row) / (row @ row) * row
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * 50)
        first = model[0]
        assert isinstance(first, nn.Linear)
        first.weight.zero_()
        first.bias.zero_()
        first.weight[0] = weight * 1e19


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rows", [2, 3, 4, 5, 16, 64, 65, 1025, 1026, 1028])
def test_leaving_one_row_out_moves_the_sum_by_one_clip_even_when_logits_are_rounding_noise(
    kind: str, rows: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(12):
        row = torch.rand(30, generator=generator, dtype=torch.float64) * 2 - 1
        model = MODELS[kind]().double()
        make_hostile(model, row, generator)
        engine = ClippedGradient(model, 1.0, "cross_entropy", self_check=False)
        inputs, targets = row.expand(rows, 30).contiguous(), torch.zeros(rows, dtype=torch.int64)
        moved = engine(inputs, targets) - engine(inputs[1:], targets[1:])
        assert float(moved.norm()) <= 1 + 1e-6


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("rows", "others"), [(2, 1), (40, 49), (64, 7), (65, 1), (128, 30), (129, 2)])
def test_leaving_one_row_out_moves_the_sum_by_one_clip_in_one_pass_with_other_sites(
    kind: str, rows: int, others: int
) -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(6):
        row = torch.rand(30, generator=generator, dtype=torch.float64) * 2 - 1
        model = MODELS[kind]().double()
        make_hostile(model, row, generator)
        engine = ClippedGradient(model, 1.0, "cross_entropy", self_check=False)
        inputs, targets = row.expand(rows, 30).contiguous(), torch.zeros(rows, dtype=torch.int64)
        engine(inputs, targets)  # the first call says what a row is
        company = [
            (torch.rand(40, 30, generator=generator, dtype=torch.float64), torch.ones(40, dtype=torch.int64))
            for _ in range(others)
        ]
        whole, *rest = engine.of_many([(inputs, targets), *company])
        less, *rest_again = engine.of_many([(inputs[1:], targets[1:]), *company])
        assert whole is not None
        assert less is not None
        assert float((whole - less).norm()) <= 1 + 1e-6
        for one, again in zip(rest, rest_again, strict=True):
            assert one is not None
            assert again is not None
            assert torch.equal(one, again)  # nothing of one site is in another's sum


@pytest.mark.parametrize("rows", [1, 3, 63, 64, 1027])
def test_filling_up_a_pass_adds_nothing(rows: int) -> None:
    generator = torch.Generator().manual_seed(5)
    model = MODELS["mlp"]().double()
    engine = ClippedGradient(model, 0.3, "cross_entropy", self_check=False)
    inputs = torch.rand(rows, 30, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 2, (rows,), generator=generator)
    mask = torch.rand(rows, generator=generator) < 0.7
    alone = sum(
        (engine(inputs[i : i + 1], targets[i : i + 1]) for i in range(rows) if mask[i]),
        torch.zeros(engine.dimension, dtype=torch.float64),
    )
    assert torch.allclose(engine(inputs, targets, mask), alone, rtol=0, atol=1e-9 * rows)


def test_a_pass_of_few_rows_leaves_an_unusable_one_out_and_keeps_the_rest() -> None:
    model = MODELS["softmax"]().double()
    engine = ClippedGradient(model, 1.0, "cross_entropy", self_check=False)
    inputs = torch.ones(3, 30, dtype=torch.float64)
    inputs[0, 4] = torch.nan  # the row that copies are made of
    targets = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(engine(inputs, targets), engine(inputs[1:], targets[1:]))
    assert not engine(inputs[:1], targets[:1]).any()


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize(("bits", "dimension"), [(8, 1), (8, 1000), (10, 38_282), (24, 62)])
def test_half_the_replace_one_sensitivity_covers_one_row_on_the_grid(
    bits: int, dimension: int, precision: str
) -> None:
    one, two = (
        release_event(
            noise_multiplier=10,
            sample_rate=1,
            local_steps=1,
            dimension=dimension,
            grid_bits=bits,
            relation=relation,
            unit="row",
            precision=precision,
        ).sensitivity_grid
        for relation in ("add_remove", "replace_one")
    )
    assert two >= 2 * one
    assert two == sensitivity_grid(
        grid_bits=bits,
        dimension=dimension,
        relation="replace_one",
        precision=precision,  # type: ignore[arg-type]
    )
