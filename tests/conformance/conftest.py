"""The tiny federation of tests/audit_verify, to have something worth judging from outside."""

from __future__ import annotations

import pytest

from tests.audit_verify.world import World


@pytest.fixture(scope="session")
def make_world() -> type[World]:
    """The class, to build a federation with."""
    return World
