"""What a form makes is what `audit.entries` makes of the same prediction, byte for byte, or is refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from audit._append_request import append_request
from audit._integrate import AppendRequest
from audit.entries import (
    EntryError,
    IndexColumns,
    Prediction,
    RowCommitment,
    columns_of,
    decode_entry,
    encode_entry,
    index_columns,
)
from audit.errors import AuditError
from audit.merkle import hash_leaf
from audit.prediction_form import PredictionForm

ACTOR, TIME = "coordinator", "2026-11-23T22:23:12Z"
ID, INPUT, OUTPUT = "0123456789abcdef" * 2, "4f" * 32, "e0" * 32
BODY = Prediction(
    request_id="",
    model="sepsis",
    version="a" * 64,
    charter="b" * 64,
    transition="c" * 64,
    purpose="triage",
    principal="key:ward-3",
    role="consumer",
    site="north",
    policies=("purpose-in-charter", "role-may-predict"),
    policy_set="d" * 64,
    rows=(),
    legal_basis="vital interests",
    region="DE",
)
TIMES = st.datetimes().map(lambda moment: f"{moment:%Y-%m-%dT%H:%M:%SZ}".zfill(20))
HEX32 = st.binary(min_size=16, max_size=16).map(bytes.hex)
HEX64 = st.binary(min_size=32, max_size=32).map(bytes.hex)
COLUMNS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


def asked(form: PredictionForm, **change: str) -> AppendRequest:
    return form.request(**{"time": TIME, "request_id": ID, "input": INPUT, "output": OUTPUT, **change})


def same(made: AppendRequest, body: Prediction, **change: str) -> None:
    """The request is the one that `audit.entries` leads to for the same values."""
    given = {"time": TIME, "request_id": ID, "input": INPUT, "output": OUTPUT, **change}
    entry = decode_entry(made.body)
    row = RowCommitment(input=given["input"], output=given["output"])
    assert entry.body == replace(body, request_id=given["request_id"], rows=(row,))
    assert (entry.actor, entry.time, entry.event_id) == (ACTOR, given["time"], made.event_id)
    assert encode_entry(entry) == made.body
    assert made.leaf_hash == hash_leaf(made.body)
    columns = index_columns(entry)
    assert columns == columns_of(made.body)
    assert made.columns == tuple(getattr(columns, field.name) for field in fields(IndexColumns))
    assert made == append_request(made.body, entry.event_id, columns, made.guard)


HOSTILE = [
    "", " ", '"', '""', "\\", "\\\\", '\\"', "\\u0061", "a\tb\nc\x00d\x7f", "%", "%s", "%(time)s", "100%%",
    "{}", "{0}", "{time}", "{{", "}", "größe", "診断", "\U0001f600", "\u2028\u2029", "\ufeff", "\ud7ff\ue000",
    '","rows":[{"input":"', '"}],"site":"', '","time":"2026-01-01T00:00:00Z","type":"key.created","v":1}',
    ID, ID.upper(), INPUT, OUTPUT, "a" * 32, "0" * 64, INPUT + OUTPUT, ID + INPUT + OUTPUT, TIME,
    "1999-12-31T23:59:59Z", "2000-01-01T00:00:00", "x" * 5000, "prediction", "null",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:16]))
@pytest.mark.parametrize("name", ["purpose", "legal_basis", "region", "role"])
def test_text_of_any_kind_is_written_as_the_entry_writes_it(name: str, text: str) -> None:
    body = replace(BODY, **{name: text})
    same(asked(PredictionForm(body, actor=ACTOR)), body)


@pytest.mark.parametrize(
    "text",
    [text for text in HOSTILE if "\0" not in text and len(text) < 1000],
    ids=lambda text: repr(text[:16]),
)
@pytest.mark.parametrize("name", ["site", "model", "principal"])
def test_what_is_searched_by_is_the_same_column_whatever_it_holds(name: str, text: str) -> None:
    body = replace(BODY, **{name: text})
    same(asked(PredictionForm(body, actor=ACTOR)), body)


@given(
    purpose=st.text(),
    legal_basis=st.text(),
    site=COLUMNS,
    principal=COLUMNS,
    policies=st.lists(st.text(max_size=9), max_size=20).map(tuple),
    digests=st.tuples(HEX64, HEX64, HEX64, HEX64),
    requests=st.lists(st.tuples(TIMES, HEX32, HEX64, HEX64), min_size=1, max_size=4),
)
@example("", "", "", "", (), ("0" * 64,) * 4, [(TIME, "0" * 32, "0" * 64, "0" * 64)])
def test_any_requests_of_any_prediction_are_its_entries(
    purpose: str,
    legal_basis: str,
    site: str,
    principal: str,
    policies: tuple[str, ...],
    digests: tuple[str, str, str, str],
    requests: list[tuple[str, str, str, str]],
) -> None:
    version, charter, transition, policy_set = digests
    body = replace(
        BODY,
        purpose=purpose,
        legal_basis=legal_basis,
        site=site,
        principal=principal,
        policies=policies,
        version=version,
        charter=charter,
        transition=transition,
        policy_set=policy_set,
    )
    form = PredictionForm(body, actor=ACTOR)
    for time, request_id, shown, said in requests:
        made = form.request(time=time, request_id=request_id, input=shown, output=said)
        same(made, body, time=time, request_id=request_id, input=shown, output=said)


@pytest.mark.parametrize(
    "change",
    [
        {"subject": "5" * 32, "context": "6" * 64, "sealed": "7" * 64, "purpose": ""},
        {"row_count": 1, "rows_root": "8" * 64},
        {"policies": ()},
        {"policies": tuple(map(str, range(40)))},
        {"request_id": "left over"},
        {"rows": (RowCommitment(input="1" * 64, output="2" * 64),) * 3},
    ],
)
def test_fields_that_are_seldom_there_are_written_too(change: dict[str, Any]) -> None:
    body = replace(BODY, **change)
    same(asked(PredictionForm(body, actor=ACTOR)), body)


@pytest.mark.parametrize("value", ["0" * 64, "f" * 64, INPUT, ID * 2])
def test_commitments_that_are_alike_stand_each_in_its_place(value: str) -> None:
    change = {"request_id": value[:32], "input": value, "output": value}
    same(asked(PredictionForm(BODY, actor=ACTOR), **change), BODY, **change)


def test_times_that_come_and_go_leave_earlier_requests_as_they_were() -> None:
    form = PredictionForm(BODY, actor=ACTOR)
    times = ["2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z", "2026-01-01T00:00:00Z", "2000-01-01T00:00:00Z"]
    made = [asked(form, time=time) for time in times * 3]
    for request, time in zip(made, times * 3, strict=True):
        same(request, BODY, time=time)


def test_forms_of_two_callers_do_not_mix() -> None:
    bodies = [BODY, replace(BODY, principal="key:ward-4", site="", purpose="audit")]
    forms = [PredictionForm(body, actor=ACTOR) for body in bodies]
    for _ in range(3):
        for form, body in zip(forms, bodies, strict=True):
            same(asked(form), body)


def test_every_request_has_its_own_event_and_nonce_though_all_else_is_equal() -> None:
    form = PredictionForm(BODY, actor=ACTOR)
    documents = [json.loads(asked(form).body) for _ in range(500)]
    names = {document[name] for document in documents for name in ("event_id", "nonce")}
    assert len(names) == 1000
    for document in documents:
        del document["event_id"], document["nonce"]
        assert document == documents[0]


def test_guard_is_handed_on_and_is_no_part_of_the_leaf() -> None:
    def guard() -> None: ...

    made = PredictionForm(BODY, actor=ACTOR).request(
        time=TIME, request_id=ID, input=INPUT, output=OUTPUT, guard=guard
    )
    assert made.guard is guard
    same(made, BODY)
    assert asked(PredictionForm(BODY, actor=ACTOR)).guard is None


@pytest.mark.parametrize(
    "change",
    [
        {"request_id": ID[:-1]},
        {"request_id": ID + "0"},
        {"request_id": ""},
        {"request_id": INPUT, "input": ID},
        {"request_id": ID[:-1], "input": INPUT + "0"},
        {"request_id": ID + "0", "input": INPUT[:-1]},
        {"request_id": ID + INPUT, "input": ""},
        {"input": INPUT[:-1], "output": OUTPUT + "0"},
        {"input": INPUT + "0", "output": OUTPUT[:-1]},
        {"input": INPUT + OUTPUT, "output": ""},
        {"input": INPUT[:32]},
        {"output": OUTPUT[:-1]},
        {"output": OUTPUT + "0"},
        {"output": OUTPUT + "\n"},
        {"output": OUTPUT[:-1] + "\n"},
        {"request_id": ID.upper()},
        {"input": INPUT.upper()},
        {"output": OUTPUT.upper()},
        {"request_id": "g" + ID[1:]},
        {"request_id": '"' + ID[1:]},
        {"input": "\\" + INPUT[1:]},
        {"input": " " + INPUT[1:]},
        {"input": "0x" + INPUT[2:]},
        {"output": "-" + OUTPUT[1:]},
        {"output": "\uff10" + OUTPUT[1:]},
        {"output": "\u0660" + OUTPUT[1:]},
        {"request_id": "1b4e28ba-2fa1-11d2-883f-0016d3cc"},
    ],
)
def test_what_is_no_hash_or_id_is_refused_even_where_the_lengths_add_up(change: dict[str, str]) -> None:
    form = PredictionForm(BODY, actor=ACTOR)
    with pytest.raises(EntryError):
        asked(form, **change)
    same(asked(form), BODY)


@given(st.text("0123456789abcdefABCDEF g\n", max_size=34), st.text("0f", min_size=60, max_size=68))
def test_what_a_form_takes_an_entry_can_hold(request_id: str, value: str) -> None:
    change = {"request_id": request_id, "input": value, "output": value}
    try:
        made = asked(PredictionForm(BODY, actor=ACTOR), **change)
    except EntryError:
        assert len(request_id) != 32 or len(value) != 64 or set(request_id) - set("0123456789abcdef")
        return
    same(made, BODY, **change)


@pytest.mark.parametrize("name", ["purpose", "legal_basis", "site", "principal", "policies"])
def test_text_that_cannot_be_cut_is_refused_and_not_written_wrongly(name: str) -> None:
    twin = "2000-01-01T00:00:00Z"  # the time for which the form is made
    body = replace(BODY, **{name: (twin,) if name == "policies" else f"since {twin}"})
    with pytest.raises(EntryError, match="cannot be cut"):
        PredictionForm(body, actor=ACTOR)


@pytest.mark.parametrize(
    "change",
    [
        {"version": "live"},
        {"charter": "B" * 64},
        {"policy_set": ""},
        {"transition": "c" * 63},
        {"subject": "Jane Doe"},
        {"row_count": True},
        {"purpose": None},
        {"purpose": 5},
        {"purpose": "x" * 70_000},
        {"site": "x" * 2000},
        {"site": "a\0b"},
        {"legal_basis": "\ud800"},
    ],
)
def test_prediction_that_no_log_would_take_has_no_form(change: dict[str, Any]) -> None:
    with pytest.raises(AuditError):
        PredictionForm(replace(BODY, **change), actor=ACTOR)


@pytest.mark.parametrize("actor", ["", "Coordinator", 'a"b', "a b", "x" * 97])
def test_actor_that_no_entry_has_is_refused(actor: str) -> None:
    with pytest.raises(EntryError, match="actor"):
        PredictionForm(BODY, actor=actor)


@pytest.mark.parametrize(
    "time",
    ["", "2026-11-23 22:23:12Z", "2026-11-23T22:23:12", 'x","type":"key.created', "2026-11-23T22:23:12Z\n"],
)
def test_time_that_no_entry_has_is_refused_and_forgotten(time):
    form = PredictionForm(BODY, actor=ACTOR)
    with pytest.raises(EntryError):
        asked(form, time=time)
    assert b'"time":"2026-11-23T22:23:12Z"' in asked(form, time="2026-11-23T22:23:12Z").body
