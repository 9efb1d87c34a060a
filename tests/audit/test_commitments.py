from __future__ import annotations

import hashlib

import pytest

from audit.commitments import commit, new_pseudonym, new_salt, parse_salt, verify_opening
from audit.errors import CommitmentError

SALT = bytes(range(32))


def test_commitment_is_the_stated_hash_and_opens() -> None:
    expected = hashlib.sha256(b"affidavit/commit/v1\x00input\x00" + SALT + b"value").hexdigest()
    assert commit("input", SALT, b"value") == expected
    verify_opening(expected, field="input", salt=SALT, value=b"value")


@pytest.mark.parametrize(
    ("field", "salt", "value"),
    [
        ("output", SALT, b"value"),
        ("input", SALT[::-1], b"value"),
        ("input", SALT, b"Value"),
        ("input", SALT, b""),
    ],
)
def test_other_field_salt_or_value_does_not_open(field: str, salt: bytes, value: bytes) -> None:
    with pytest.raises(CommitmentError, match="do not open"):
        verify_opening(commit("input", SALT, b"value"), field=field, salt=salt, value=value)


@pytest.mark.parametrize("commitment", ["", "x" * 64, commit("input", SALT, b"value").upper(), "00" * 31])
def test_malformed_commitment_is_refused(commitment: str) -> None:
    with pytest.raises(CommitmentError):
        verify_opening(commitment, field="input", salt=SALT, value=b"value")


@pytest.mark.parametrize("field", ["", "a\x00b", "Input", "a b", "x" * 65, "1a"])
def test_field_that_could_be_read_two_ways_is_refused(field: str) -> None:
    with pytest.raises(CommitmentError):
        commit(field, SALT, b"")


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_salt_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(CommitmentError):
        commit("input", b"s" * size, b"")


@pytest.mark.parametrize(
    "text", ["", "AB" * 32, "ab" * 31 + "aB", " " + "ab" * 32, "ab " * 32, "ab" * 31, "ab" * 33, "zz" * 32]
)
def test_salt_has_one_text_alone(text: str) -> None:
    with pytest.raises(CommitmentError, match="64 lower-case hex digits"):
        parse_salt(text)
    assert parse_salt(SALT.hex()) == SALT


def test_equal_values_are_unlinkable_and_not_guessable() -> None:
    commitments = {commit("input", new_salt(), b"age=61") for _ in range(2000)}
    assert len(commitments) == 2000
    guesses = {commit("input", bytes(32), b"age=%d" % age) for age in range(120)}
    assert not guesses & commitments


def test_pseudonyms_are_random() -> None:
    made = {new_pseudonym() for _ in range(1000)}
    assert len(made) == 1000
    assert all(len(name) == 32 for name in made)
