"""Hostile evidence files: any bytes give a report or the declared error; nothing is unpacked past a cap."""

from __future__ import annotations

import io
import tracemalloc
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.evidence import EvidenceError, build_zip, read_evidence, read_zip
from audit.verify import verify_evidence
from audit.verify.report import Verdict

GOOD = build_zip({"checkpoint": b"c", "manifest.json": b"{}", "proofs.json": b"{}", "entries/0.json": b"{}"})


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_any_bytes_are_refused_with_the_declared_error(data: bytes) -> None:
    for hostile in (data, b"PK\3\4" + data, GOOD[: len(data)] + data):
        with pytest.raises(EvidenceError):
            read_evidence(hostile)
        assert verify_evidence(hostile, policy_text=None).verdict is Verdict.INVALID


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
@settings(deadline=None)
def test_no_changed_byte_reads_as_the_same_zip(position: int, change: int) -> None:
    altered = bytearray(GOOD)
    altered[position] ^= change
    try:
        found = read_zip(bytes(altered))
    except EvidenceError:
        return
    assert found != read_zip(GOOD), "a byte that means nothing"


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "entries/../../x", "entries/00.json", "a\\b", "artefacts/..", "policy.txt/x"],
)
def test_name_that_leads_elsewhere_is_refused(name: str) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(EvidenceError):
        read_evidence(stream.getvalue())


def test_bomb_is_refused_without_being_unpacked() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", bytes(100 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(EvidenceError):
            read_evidence(stream.getvalue())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
