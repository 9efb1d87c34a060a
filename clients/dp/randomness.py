"""Coins and noise from AES-256 in counter mode, never from torch or numpy generators.

torch's CPU generator keeps 32 bits of its seed, so noise drawn from it can be subtracted again. Here the key
has 256 bits from the operating system, a forked child never continues its parent's stream, and a generator
cannot be copied or pickled. `UnsafeSeededRandom` exists so that a test can replay a run; nothing else may use
it.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from decimal import Decimal
from fractions import Fraction
from typing import NoReturn, Self

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from clients.dp.errors import TermsError

MAX_SIGMA_GRID = 1 << 32

_BLOCK_BYTES = 1 << 20
_ZEROS = bytes(_BLOCK_BYTES)
_TWO_64 = 1 << 64
_MAX_PROPOSALS = 16384
_ONE = np.uint64(1)
_SIGN_SHIFT = np.uint64(63)

_fork_generation = 0


def _count_fork() -> None:
    global _fork_generation
    _fork_generation += 1


os.register_at_fork(after_in_child=_count_fork)


class SecureRandom:
    """A stream of bits under one fresh 256-bit key of the operating system; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rekey(os.urandom(32))

    def _rekey(self, key: bytes) -> None:
        self._generation = _fork_generation
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def child(self, label: str) -> SecureRandom:
        """Return an independent stream; `label` only matters to the seeded subclass."""
        return SecureRandom()

    def refresh(self) -> None:
        """Go on under a new key of the operating system: a copy of this process draws something else."""
        with self._lock:
            self._rekey(os.urandom(32))

    def uniform_bytes(self, size: int) -> bytes:
        """Return `size` uniform bytes of the stream."""
        with self._lock:
            if self._generation != _fork_generation:
                self._rekey(os.urandom(32))
            if size <= _BLOCK_BYTES:
                return self._stream.update(_ZEROS[:size])
            blocks, rest = divmod(size, _BLOCK_BYTES)
            parts = [self._stream.update(_ZEROS) for _ in range(blocks)]
            return b"".join([*parts, self._stream.update(_ZEROS[:rest])])

    def uniform_u64(self, size: int) -> NDArray[np.uint64]:
        """Return `size` independent uniform 64-bit integers (read-only)."""
        return np.frombuffer(self.uniform_bytes(8 * size), dtype="<u8")

    def bernoulli(self, probability: float | Decimal, size: int) -> NDArray[np.bool_]:
        """Return `size` independent coins, each true with `probability` to within 2**-64.

        Probabilities 0 and 1 are exact and draw nothing.

        Raises:
            TermsError: probability is outside [0, 1].
        """
        if not 0 <= probability <= 1:
            raise TermsError("probability", probability, "give a number in [0, 1]")
        threshold = math.floor(Fraction(probability) * _TWO_64)
        if threshold in (0, _TWO_64):
            return np.full(size, threshold > 0)
        return self.uniform_u64(size) < np.uint64(threshold)

    def discrete_gaussian(self, sigma: float, size: int) -> NDArray[np.int64]:
        """Return `size` independent integers k with probability proportional to exp(-k**2 / (2 sigma**2)).

        Rejection from a two-sided geometric of scale t = floor(sigma) + 1, accepting k with probability
        exp(-(|k| - sigma**2/t)**2 / (2 sigma**2)). The acceptance rule makes the distribution exact but for
        the double-precision evaluation of one logarithm and one exponential of 63-bit uniforms: at scale t
        the boundary between two neighbouring integers moves by less than 64 t 2**-53 of a unit. Draws reach
        43 t, far past the tail.

        Args:
            sigma: in grid units, > 0 and at most 2**32 (above it the 53 bits of a double would show); the
                standard deviation, from about 1 on.
            size: number of draws.

        Raises:
            TermsError: sigma is outside its range.

        Source: Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy", Algorithm 3.
        """
        if not 0 < sigma <= MAX_SIGMA_GRID:
            raise TermsError("sigma", sigma, f"give grid units in (0, 2**32], not more than {MAX_SIGMA_GRID}")
        sampler = _GaussianSampler(float(sigma), min(_proposals_for(size), _MAX_PROPOSALS))
        result = np.empty(size, dtype=np.int64)
        filled = 0
        while filled < size:
            proposals = min(_proposals_for(size - filled), _MAX_PROPOSALS)
            draws = sampler.accept(self.uniform_u64(2 * proposals))[: size - filled]
            result[filled : filled + len(draws)] = draws
            filled += len(draws)
        return result

    def __copy__(self) -> NoReturn:
        raise TypeError("a random stream must not be copied: two copies would draw the same noise")

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__copy__()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a random stream must not be stored: two readers would draw the same noise")


def _proposals_for(size: int) -> int:
    return int(size * 1.35) + 32  # three in four are accepted


class _GaussianSampler:
    """One rejection pass at a time over scratch arrays small enough to stay in the processor's cache."""

    def __init__(self, sigma: float, proposals: int) -> None:
        self._scale = float(math.floor(sigma) + 1)
        self._centre = sigma * sigma / self._scale
        self._inverse = 1.0 / (math.sqrt(2.0) * sigma)
        self._magnitude = np.empty(proposals)
        self._exponent = np.empty(proposals)
        self._threshold = np.empty(proposals)

    def accept(self, bits: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Return the accepted whole numbers among the candidates, one for every two words."""
        size = len(bits) // 2
        first, second = bits[:size], bits[size:]
        magnitude, exponent, threshold = self._magnitude[:size], self._exponent[:size], self._threshold[:size]
        magnitude[:] = (first >> _ONE).view(np.int64)
        magnitude += 0.5
        magnitude *= 2.0**-63
        np.log(magnitude, out=magnitude)
        magnitude *= -self._scale
        np.floor(magnitude, out=magnitude)
        np.subtract(magnitude, self._centre, out=exponent)
        exponent *= self._inverse
        np.multiply(exponent, exponent, out=exponent)
        np.negative(exponent, out=exponent)
        np.exp(exponent, out=exponent)
        threshold[:] = (second >> _ONE).view(np.int64)
        threshold += 0.5
        threshold *= 2.0**-63
        sign = first << _SIGN_SHIFT
        accepted = threshold < exponent
        if not magnitude.all():
            accepted &= (sign == 0) | (magnitude != 0)  # zero has one sign, or it would count twice
        signed = magnitude.view(np.uint64)
        signed |= sign
        return magnitude[accepted]


class UnsafeSeededRandom(SecureRandom):
    """The same stream for the same key. For tests only: whoever knows the key can remove the noise.

    A forked child leaves the seeded stream and draws from the operating system.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise TermsError("key", f"{len(key)} bytes", "give exactly 32 bytes")
        super().__init__()
        self._key = key
        self._rekey(key)

    def refresh(self) -> None:
        """Stay on the seeded stream."""

    def child(self, label: str) -> Self:
        return type(self)(hashlib.sha256(self._key + label.encode()).digest())
