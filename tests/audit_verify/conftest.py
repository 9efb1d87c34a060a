"""One honest federation to read, and the class to build those that lie."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import pytest

from tests.audit_verify.hospitals import NOW
from tests.audit_verify.world import World


@dataclass(frozen=True)
class Honest:
    """One honest federation and its evidence; read, never changed."""

    world: World
    index: int
    opened: list[dict[str, str]]
    data: bytes


@pytest.fixture(scope="session")
def make_world() -> type[World]:
    """The class, to build a federation that lies somewhere."""
    return World


@pytest.fixture(scope="session")
def now() -> datetime:
    return NOW


@pytest.fixture(scope="session")
def honest() -> Honest:
    world = World()
    index, opened = world.whole()
    world.publish()
    return Honest(world, index, opened, world.evidence(index, opened=opened, receipt=True))
