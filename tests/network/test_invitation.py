"""An invitation is one line; what is cut, altered or made up is no invitation."""

from __future__ import annotations

import base64
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.network.errors import InvitationError
from federation.network.invitation import Invitation, secret_digest, site_slug


def test_line_reads_back_as_it_was_made(office):
    made = office.invite("St Mary's Hospital")
    line = made.format()
    assert "\n" not in line
    assert Invitation.parse(f"  {line}\n") == made
    assert made.site == "st-mary-s-hospital"


def test_log_never_holds_the_secret(office):
    made = office.invite()
    stored = b"".join(office.ledger.entries(0, office.ledger.tree_size))
    assert made.secret.encode() not in stored
    assert secret_digest(made.secret).encode() in stored


@pytest.mark.parametrize("cut", [1, 5, 9, 40, 200])
def test_line_cut_short_is_refused(office, cut):
    with pytest.raises(InvitationError):
        Invitation.parse(office.invite().format()[:-cut])


def test_line_with_another_address_is_refused(office):
    prefix, body, check = office.invite().format().split(".")
    document = json.loads(base64.urlsafe_b64decode(body + "=="))
    document["address"] = "evil.example.org:8443"
    forged = base64.urlsafe_b64encode(json.dumps(document).encode()).decode().rstrip("=")
    with pytest.raises(InvitationError, match="altered"):
        Invitation.parse(f"{prefix}.{forged}.{check}")


@pytest.mark.parametrize(
    "change",
    [
        {"address": "https://evil.example.org"},
        {"address": "host:0"},
        {"ca": "AB" * 32},
        {"secret": "12"},
        {"site": "../../etc"},
        {"expires": "2026-13-01T00:00:00Z"},
        {"log": "not a key"},
        {"label": ""},
        {"more": "x"},
    ],
)
def test_well_formed_line_that_says_the_impossible_is_refused(office, change):
    prefix, body, _ = office.invite().format().split(".")
    document = json.loads(base64.urlsafe_b64decode(body + "==")) | change
    data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    line = base64.urlsafe_b64encode(data).decode().rstrip("=")
    with pytest.raises(InvitationError):
        Invitation.parse(f"{prefix}.{line}.{hashlib.sha256(data).hexdigest()[:8]}")


@given(st.text(max_size=300))
def test_no_text_makes_parsing_fail_in_another_way(text):
    with pytest.raises(InvitationError):
        Invitation.parse(text)


@pytest.mark.parametrize("label", ["", "!!!", "   ", "日本"])
def test_label_that_makes_no_name_is_refused(label):
    with pytest.raises(InvitationError, match="--name"):
        site_slug(label)
