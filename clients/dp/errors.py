"""What the private step refuses, by stable code; a row of data is never a reason."""

from __future__ import annotations

from clients.errors import ClientsError


class DPError(ClientsError):
    """Base of every error `clients.dp` raises on purpose."""

    code = "clients.dp.error"


class TermsError(DPError, ValueError):
    """A constant of the mechanism is out of range."""

    code = "clients.dp.terms"

    def __init__(self, field: str, value: object, fix: str) -> None:
        super().__init__(f"{field}={value!r} is refused: {fix}")
        self.field, self.value, self.fix = field, value, fix


class UnsupportedModelError(DPError):
    """The model has no well-defined gradient for each single row, or none that we can compute."""

    code = "clients.dp.unsupported_model"

    def __init__(self, layer: str, reason: str) -> None:
        super().__init__(f"{layer}: {reason}")
        self.layer, self.reason = layer, reason


class ShapeError(DPError):
    """Inputs, targets and mask do not agree with each other or with the first call."""

    code = "clients.dp.shape"

    def __init__(self, field: str, found: object, expected: object) -> None:
        super().__init__(f"{field} is {found}, expected {expected}")
        self.field, self.found, self.expected = field, found, expected


class GridOverflowError(DPError):
    """The integer grid is too fine for 64 bits; lower grid_bits or the noise."""

    code = "clients.dp.grid_overflow"

    def __init__(self, *, grid_bits: int, sigma_grid: int) -> None:
        super().__init__(
            f"grid_bits={grid_bits}, sigma_grid={sigma_grid}: no room in int64 for the sum, lower grid_bits"
        )
        self.grid_bits, self.sigma_grid = grid_bits, sigma_grid
