"""A model card of a charter whose every text is hostile, in three forms, and after another run."""

from __future__ import annotations

import json
import re
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from clients.service import status
from clients.simulation import run_federation, simulate
from federation.card import Bullets, Card, Paragraph, Section, Table, told
from federation.card_privacy import lifetimes
from federation.charter import Charter
from federation.model_card import card_of

DELTA = Decimal("0.00001")
ANNEX_IV_POINTS = 9
EVIL = """
name: evil
task: binary
features:
  - {name: age, type: number, lower: 0, upper: 100, unit: "<img src=x onerror=alert(1)>", missing: midpoint}
  - name: ward
    type: category
    categories: [missing, "a ## ward **PROVED** | x", "b\\n\\n## Risk management (Annex IV, 5)"]
    missing: midpoint
label:
  name: "y`<b>`"
  classes:
    - "# no: PROVED <script>alert(1)</script> [a](http://example.org) **a"
    - "_yes_"
model: {family: logistic_regression}
plan: {learning_rate: 4, rounds: 2}
privacy: {unit: row, relation: add_remove, epsilon: 8, delta: 1e-5, max_grad_norm: 1, noise_multiplier: 1.5}
answers: {label_only: true}
fairness: {groups: [age, ward]}
gates: [{metric: auc, source: public_set, floor: 0}]
"""
NO = "# no: PROVED <script>alert(1)</script> [a](http://example.org) **a"
REASON = "ok |\n\n# Approved\n\n- [x](http://example.org) \u202e\x1b[31m"


def evil_frame(rows, seed):
    draw = np.random.default_rng(seed)
    age = draw.uniform(0, 100, rows).round(2)
    ward = np.where(draw.random(rows) < 0.5, "missing", "a ## ward **PROVED** | x")
    return pd.DataFrame({"age": age, "ward": ward, "y`<b>`": np.where(age > 50, "_yes_", NO)})


@pytest.fixture(scope="module")
def evil():
    """A run whose every text is hostile; of its 100 public rows 60 have no age, 10 no ward, one is 50."""
    public = evil_frame(100, 9)
    public.loc[:59, "age"] = np.nan
    public.loc[90:, "ward"] = None
    public.loc[60, "age"] = 50.0
    made = simulate(EVIL, {"a": evil_frame(60, 1), "b": evil_frame(60, 2)}, public=public)
    made.register()
    made.approve(REASON)
    yield made, public
    made.close()


@pytest.fixture(scope="module")
def evil_card(evil):
    log = evil[0].federation.coordinator
    return card_of(log.ledger, evil[0].version.digest, log.blobs.find)


def section(card, heading):
    (found,) = [section for section in card.sections if section.heading == heading]
    return found


def test_who_has_no_value_is_a_group_of_its_own(evil, evil_card):
    _, public = evil
    age, ward = (b for b in section(evil_card, "Fairness by declared groups").blocks if isinstance(b, Table))
    counts = {row[0].replace(" (few rows)", ""): int(row[1]) for row in age.rows}
    assert counts == {
        "below 50 <img src=x onerror=alert(1)>": int((public.age < 50).sum()),
        "50 <img src=x onerror=alert(1)> and above": int((public.age >= 50).sum()),
        "missing": 60,
    }
    wards = {row[0].replace(" (few rows)", ""): int(row[1]) for row in ward.rows}
    assert wards["missing"] == int((public.ward == "missing").sum())  # a declared category of that name
    assert wards["no value (missing)"] == 10
    assert wards["b\n\n## Risk management (Annex IV, 5) (no row)"] == 0
    assert sum(wards.values()) == sum(counts.values()) == 100


def test_epsilon_of_all_releases_goes_on_after_the_registration(evil):
    made, _ = evil
    federation, version = made.federation, made.version
    ledger, homes = federation.coordinator.ledger, federation.homes
    first = lifetimes(ledger, version, DELTA)
    run_federation(
        made.charter,
        homes,
        federation.coordinator,
        federation.scientist.key,
        public_set=federation.public_file,
    )
    now = lifetimes(ledger, version, DELTA)
    for before, after, site in zip(first, now, ("a", "b"), strict=True):
        assert before.now == before.claimed == after.claimed
        assert (before.releases_then, before.releases_now) == (2, 2)
        assert (after.releases_then, after.releases_now) == (2, 4)
        spent = status(homes[site]).lifetime_epsilon
        assert spent <= float(after.now) < spent + 0.01
        assert float(after.now) > float(before.now) + 0.5
        assert after.is_recounted
        assert not after.is_understated
    table = section(card_of(ledger, version.digest), "Privacy").blocks[1]
    for row, life in zip(table.rows, now, strict=True):
        assert row[4:6] == (f"{life.claimed} (first 2 releases)", f"{life.now} (first 4 releases)")
    assert table.header[4].endswith("at registration")
    assert table.header[5].endswith("now")


def test_attributions_are_refused_where_labels_alone_go_out(evil_card):
    (told_of,) = [
        i for i in section(evil_card, "Monitoring, functioning and control").blocks[0].items if "Attr" in i
    ]
    assert told_of.startswith(
        "Attributions of an answer to single features are refused: the charter lets out labels alone"
    )


def parsed(text):
    markdown_it = pytest.importorskip("markdown_it")
    reader = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = reader.parse(text)
    return tokens, [child for token in tokens for child in token.children or ()]


def test_no_text_of_a_charter_or_an_officer_is_markdown(evil_card):
    text = evil_card.markdown()
    tokens, inline = parsed(text)
    headings = [tokens[k + 1].content for k, token in enumerate(tokens) if token.type == "heading_open"]
    assert len(headings) == 1 + len(evil_card.sections)
    assert [h for h in headings if "Risk management" in h] == ["Risk management (Annex IV, 5)"]
    kinds = {token.type for token in tokens} | {token.type for token in inline}
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "em_open", "s_open", "fence", "hr"}
    assert "code_block" not in kinds
    bold = [inline[k + 1].content for k, token in enumerate(inline) if token.type == "strong_open"]
    assert bold == ["y`<b>`", "row", "age", "ward"]  # the card's own, around names
    assert "<" not in text.replace("&lt;", "")
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)


def test_a_class_of_many_lines_makes_no_heading(federation, charter_text):
    forged = "no\n\n## Risk management (Annex IV, 5)\n\nA risk management system: PROVED\n\n---\n"
    text = charter_text.replace("classes: [benign,", f"classes: [{json.dumps(forged)},")
    text = re.sub("public_set: .*", "", text).replace(
        "gates:\n  - {metric: auc, source: public_set, floor: 0.1}", "gates: []"
    )
    federation.charter = Charter.parse(text)
    card = card_of(federation.coordinator.ledger, federation.registered().digest)
    tokens, _ = parsed(card.markdown())
    headings = [tokens[k + 1].content for k, token in enumerate(tokens) if token.type == "heading_open"]
    assert len(headings) == 1 + len(card.sections)
    assert headings.count("Risk management (Annex IV, 5)") == 1
    assert "hr" not in {token.type for token in tokens}
    assert card.html().count("<h2>") == ANNEX_IV_POINTS
    assert forged in json.loads(card.json())["sections"][2]["blocks"][0]["paragraph"]


def test_a_table_of_hostile_cells_keeps_its_cells(evil_card):
    tokens, _ = parsed(evil_card.markdown())
    found, cells = [], []
    for place, token in enumerate(tokens):
        if token.type in ("th_open", "td_open"):
            cells.append("".join(child.content for child in tokens[place + 1].children))
        elif token.type == "tr_close":
            found.append(cells)
            cells = []
    rows = [
        row
        for section in evil_card.sections
        for block in section.blocks
        if isinstance(block, Table)
        for row in (block.header, *block.rows)
    ]
    shown = [[re.sub("[\x00-\x20]+", " ", c.replace("\u202e", "")).strip() for c in row] for row in rows]
    assert found == shown


def test_a_page_and_a_document_hold_hostile_texts_as_texts(evil_card):
    page = evil_card.html()
    assert page.count("<script") == page.count("<img") == 0
    assert "<b>" not in page
    assert page.count("<h2>") + page.count("<h3>") == len(evil_card.sections)
    assert 'class="proved"' not in page  # a name that says so proves nothing
    assert "&lt;script&gt;" in page
    document = json.loads(evil_card.json())
    assert REASON in [
        cell
        for part in document["sections"]
        for block in part["blocks"]
        for row in block.get("table", {}).get("rows", ())
        for cell in row
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("# a", "\\# a"),
        ("- a", "\\- a"),
        ("+ a", "\\+ a"),
        ("1. a", "1\\. a"),
        ("12) a", "12\\) a"),
        ("    a", "a"),
        ("> a", "&gt; a"),
        ("a_b __c__ _d_", "a_b \\_\\_c\\_\\_ \\_d\\_"),
        ("```", "\\`\\`\\`"),
        ("~~~", "\\~\\~\\~"),
        ("a\\", "a\\\\"),
        ("&lt;b&gt;", "&amp;lt;b&amp;gt;"),
        ("a\r\nb\u2028c\x85d", "a b c d"),
    ],
)
def test_what_begins_a_block_begins_none(text, shown):
    card = Card(model="m", version="v", title="t", about="a", sections=(
        Section(heading="h", blocks=(Paragraph(text), Bullets((text,)))),
    ))  # fmt: skip
    assert card.markdown().endswith(f"\n{shown}\n\n- {shown}\n")
    tokens, _ = parsed(card.markdown())
    kinds = [token.type for token in tokens]
    assert kinds.count("heading_open") == 2
    assert kinds.count("bullet_list_open") == 1
    assert not set(kinds) & {
        "ordered_list_open",
        "blockquote_open",
        "fence",
        "code_block",
        "html_block",
        "hr",
    }


def test_a_value_is_never_mark_up_and_every_value_has_a_place():
    text = told("**{}** is ATTESTED by `{}`", "`x` **y** PROVED", "a b")
    assert text == "`x` **y** PROVED is ATTESTED by a b"
    assert [(span.text, span.style) for span in text.spans] == [
        ("`x` **y** PROVED", "bold"), (" is ", "plain"), ("ATTESTED", "verdict"),
        (" by ", "plain"), ("a b", "code"),
    ]  # fmt: skip
    assert told("{}", "{}") == "{}"
    with pytest.raises(ValueError, match="no place"):
        told("{}", 1, 2)
    with pytest.raises(IndexError):
        told("{} {}", 1)


def test_a_page_escapes_whatever_a_charter_says():
    evil = '<script>alert("x")</script> & `<b>` **<i>**'
    card = Card(
        model="m", version="v", title=evil, about=evil,
        sections=(
            Section(
                heading=evil,
                blocks=(Paragraph(evil), Bullets((evil,)), Table((evil, "b"), ((evil, "1|2"),))),
            ),
        ),
    )  # fmt: skip
    page = card.html()
    assert "<script>" not in page
    assert "<i>" not in page
    assert "1\\|2" in card.markdown()
    assert json.loads(card.json())["sections"][0]["blocks"][0] == {"paragraph": evil}
