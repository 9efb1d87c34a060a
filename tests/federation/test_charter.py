"""What a charter refuses, and what it means: every bad line is named with its key and its fix."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from audit.keys import SigningKey
from federation.charter import Charter
from federation.draft import draft_charter, read_header
from federation.errors import CharterError, CharterFileError, FederationError

BAD = [
    # what the person wrote, what it replaces, the key that is named, words of the message
    ("epsilon: 3", "epsilon: -1", "privacy.epsilon", "greater than 0"),
    ("epsilon: 3", "epsilon: 0", "privacy.epsilon", "greater than 0"),
    ("epsilon: 3", 'epsilon: "3"', "privacy.epsilon", "without quotes"),
    ("epsilon: 3", "epsilon: yes", "privacy.epsilon", "is not a number"),
    ("epsilon: 3", "epsilon: true", "privacy.epsilon", "is not a number"),
    ("epsilon: 3", "epsilom: 3", "privacy.epsilom", "did you mean `epsilon`?"),
    ("epsilon: 3", "", "privacy.epsilon", "is missing"),
    ("delta: 1e-5", "delta: 1", "privacy.delta", "less than 1"),
    ("delta: 1e-5", "delta: 0", "privacy.delta", "greater than 0"),
    ("max_grad_norm: 1", "max_grad_norm: 0", "privacy.max_grad_norm", "greater than 0"),
    ("noise_multiplier: 3", "noise_multiplier: -0.5", "privacy.noise_multiplier", "greater than 0"),
    ("unit: row", "unit: patient", "privacy.unit", "choose one of row, subject"),
    ("unit: row", "unit: subject", "privacy.subject_id", "whose row it is"),
    ("unit: row", "unit: subject\n  subject_id: pid", "privacy.max_rows_per_subject", "needs a bound"),
    ("unit: row", "unit: row\n  subject_id: pid", "privacy.unit", "write unit: subject"),
    (
        "unit: row",
        "unit: subject\n  subject_id: pid\n  max_rows_per_subject: 3\n  sample_rate: 0.5",
        "privacy.sample_rate",
        "protects no subject",
    ),
    (
        "unit: row",
        "unit: subject\n  max_rows_per_subject: 1\n  subject_id: radius",
        "privacy.subject_id",
        "is a feature",
    ),
    ("relation: add_remove", "relation: swap", "privacy.relation", "choose one of"),
    (
        "noise_multiplier: 3",
        "noise_multiplier: 3\n  grid_bits: 36\n  sample_rate: 1.5",
        "privacy.sample_rate",
        "at most 1",
    ),
    ("noise_multiplier: 3", "noise_multiplier: 1e6\n  grid_bits: 36", "privacy.grid_bits", "overflow"),
    ("lower: 0, upper: 10", "lower: 10, upper: 0", "features[0].lower", "swap the two"),
    ("lower: 0, upper: 10", "lower: 5, upper: 5", "features[0].lower", "is not below"),
    ("lower: 0, upper: 10", "lower: 0", "features[0].upper", "never from anybody's data"),
    ("lower: 0, upper: 10", "lower: TODO, upper: 10", "features[0].lower", "still says TODO"),
    ("type: boolean", "type: boolean, transform: log", "features[2].transform", "has no transform"),
    ("type: boolean", "type: boolean, lower: 0", "features[2].lower", "has no bounds"),
    ("type: boolean", "type: bool", "features[2].type", "did you mean boolean?"),
    ("categories: [I, II, III]", "categories: [I]", "features[3].categories", "two different values"),
    ("categories: [I, II, III]", "categories: [I, I]", "features[3].categories", "two different values"),
    ("categories: [I, II, III]", "categories: I", "features[3].categories", "is not a list"),
    ("name: smoker", "name: radius", "features[2].name", "is feature 1 already"),
    ("name: smoker", "name: diagnosis", "features[2].name", "is the label"),
    ("classes: [benign, malignant]", "classes: [benign]", "label.classes", "exactly two"),
    ("classes: [benign, malignant]", "classes: [a, b, c]", "label.classes", "exactly two"),
    ("classes: [benign, malignant]", "lower: 0, upper: 1", "label.classes", "exactly two"),
    ("task: binary", "task: regression", "label", "needs label bounds"),
    ("task: binary", "task: binry", "task", "did you mean binary?"),
    (
        "family: logistic_regression",
        "family: logistic_regresion",
        "model.family",
        "did you mean logistic_regression?",
    ),
    ("family: logistic_regression", "family: transformer", "model.family", "choose one of"),
    ("family: logistic_regression", "family: linear", "model.family", "write family: logistic_regression"),
    ("family: logistic_regression", "family: mlp", "model.hidden", "add `hidden:`"),
    (
        "family: logistic_regression",
        "family: mlp, hidden: [0]",
        "model.hidden[0]",
        "greater than or equal|at least",
    ),
    (
        "family: logistic_regression",
        "family: logistic_regression, hidden: [3]",
        "model.hidden",
        "does not belong",
    ),
    (
        "family: logistic_regression",
        "family: cnn, image: [1, 4, 4], channels: [2]",
        "model.image",
        "16 values",
    ),
    (
        "family: logistic_regression",
        "family: layers, layers: [{layer: linear, in: 5, out: 1}]",
        "model.layers[0]",
        "does not take",
    ),
    (
        "family: logistic_regression",
        "family: layers, layers: [{layer: linear, in: 6, out: 2}]",
        "model.layers[0]",
        "needs \\[1\\]",
    ),
    (
        "family: logistic_regression",
        "family: layers, layers: [{layer: attention}]",
        "model.layers[0]",
        "unknown layer",
    ),
    (
        "family: logistic_regression",
        "family: layers, layers: [{layer: embedding, count: 9, size: 2}]",
        "model.layers[0]",
        "one-hot",
    ),
    ("rounds: 3", "rounds: 0", "plan.rounds", "at least 1"),
    ("rounds: 3", "rounds: 3.5", "plan.rounds", "whole number"),
    ("rounds: 3", "rounds: 3, average_last: 4", "plan.average_last", "write at most 3"),
    ("minimum_sites: 2", "minimum_sites: 4", "plan.minimum_sites", "write at most 3"),
    ("learning_rate: 2, ", "", "plan.learning_rate", "is missing"),
    ("name: south", "name: north", "sites[1].name", "occurs twice"),
    ("name: south", "name: South", "sites[1].name", "lower-case letters"),
    ("nominal_rows: 50", "nominal_rows: 0", "sites[1].nominal_rows", "at least 1"),
    ("source: public_set", "source: north", "gates[0].source", "cannot be recomputed"),
    ("metric: auc", "metric: r2", "gates[0].metric", "does not fit a binary task"),
    (", floor: 0.1", "", "gates[0]", "asks for nothing"),
    ("purposes: [research]", "purposes: []", "purposes", "wrong number"),
    ("name: dr-ito", "name: dr-lee", "officers[1].name", "occurs twice"),
]


@pytest.mark.parametrize(("old", "new", "path", "words"), BAD, ids=[f"{b[2]}:{b[1][:30]}" for b in BAD])
def test_bad_charter_names_line_key_and_fix(charter_text, old, new, path, words):
    assert old in charter_text
    with pytest.raises(CharterError, match=words) as caught:
        Charter.parse(charter_text.replace(old, new, 1), source="my.yaml")
    problem = next(p for p in caught.value.problems if p.path == path)
    assert problem.line is not None
    assert f"my.yaml:{problem.line}: {path}: " in str(caught.value)
    assert problem.fix


def test_named_line_is_the_line_of_the_mistake(charter_text):
    text = charter_text.replace("epsilon: 3", "epsilon: -3")
    with pytest.raises(CharterError) as caught:
        Charter.parse(text)
    wanted = 1 + next(i for i, line in enumerate(text.splitlines()) if "epsilon: -3" in line)
    assert [p.line for p in caught.value.problems] == [wanted]


def test_every_problem_is_reported_at_once(charter_text):
    text = charter_text.replace("lower: 0, upper: 10", "lower: 10, upper: 0").replace(
        "metric: auc", "metric: r2"
    )
    with pytest.raises(CharterError) as caught:
        Charter.parse(text)
    assert {p.path for p in caught.value.problems} == {"features[0].lower", "gates[0].metric"}


@pytest.mark.parametrize("key", ["ed25519:AAAA", "ed25519:" + "A" * 43 + "=", "rsa:abc"])
def test_a_key_that_nobody_can_hold_is_refused(charter_text, keys, key):
    with pytest.raises(CharterError, match="affidavit identity new"):
        Charter.parse(charter_text.replace(keys["north"].text, key))


def test_two_members_cannot_share_a_key(charter_text, keys):
    with pytest.raises(CharterError, match="another member's key"):
        Charter.parse(charter_text.replace(keys["north"].text, keys["south"].text))


def test_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(CharterFileError, match=r"nowhere\.yaml: cannot be read"):
        Charter.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("one", "other"), [("1e-5", "0.00001"), ("3", "3.0"), ("3", "+3"), ("0.5", ".50"), ("1", "1.")]
)
def test_equal_numbers_give_one_digest(charter_text, one, other):
    first, second = (
        Charter.parse(charter_text.replace("noise_multiplier: 3", f"noise_multiplier: {number}"))
        for number in (one, other)
    )
    assert first.digest == second.digest


def test_layout_and_comments_do_not_change_the_digest(charter, charter_text):
    assert (
        Charter.parse("# hello\n" + charter_text.replace(": 3\n", ":   3   # three\n")).digest
        == charter.digest
    )


def test_any_changed_term_changes_the_digest(charter, charter_text):
    for old, new in (
        ("epsilon: 3", "epsilon: 4"),
        ("rounds: 3", "rounds: 4"),
        ("[research]", "[research, care]"),
    ):
        assert Charter.parse(charter_text.replace(old, new)).digest != charter.digest


@pytest.mark.parametrize(
    "model",
    [
        "family: logistic_regression, site_intercept: true",
        "family: mlp, hidden: [5, 3], activation: tanh, site_intercept: true",
        "family: cnn, image: [1, 2, 3], channels: [2]",
        "family: layers, layers: [{layer: linear, in: 6, out: 1, bias: false}]",
        "family: layers, layers: [{layer: layer_norm, size: 6}, {layer: linear, in: 6, out: 1}]",
    ],
)
def test_both_written_forms_read_back_to_the_same_digest(charter_text, model):
    charter = Charter.parse(charter_text.replace("family: logistic_regression", model))
    assert Charter.parse(charter.to_yaml()).digest == charter.digest
    assert Charter.from_canonical(charter.canonical().decode()).digest == charter.digest


TERMS = {
    "decisions: legal_effect": ("legal_effect", True),
    "legal_basis: required": ("needs_legal_basis", True),
    "regions: [eu, ch]": ("regions", ("ch", "eu")),
    "max_age_days: 365": ("max_age_days", 365),
}


@pytest.mark.parametrize("term", TERMS)
def test_term_of_use_is_another_charter_in_both_forms_and_for_the_verifier(charter, charter_text, term):
    from audit.charter_view import read_charter

    with_term = Charter.parse(f"{charter_text.rstrip()}\n{term}\n")
    assert with_term.digest != charter.digest
    assert Charter.parse(with_term.to_yaml()).digest == with_term.digest
    assert Charter.from_canonical(with_term.canonical().decode()).digest == with_term.digest
    name, value = TERMS[term]
    assert getattr(read_charter(with_term.canonical()), name) == value
    assert not getattr(read_charter(charter.canonical()), name)


def test_terms_that_ask_for_nothing_keep_the_digest(charter, charter_text):
    text = f"{charter_text.rstrip()}\ndecisions: support\nregions: []\n"
    assert Charter.parse(text).digest == charter.digest


@pytest.mark.parametrize(
    "term",
    ["decisions: final", "legal_basis: maybe", "regions: [EU]", "max_age_days: 0", "max_age_days: 1.5"],
)
def test_term_of_use_that_is_none_is_refused(charter_text, term):
    with pytest.raises(CharterError, match=term.partition(":")[0]):
        Charter.parse(f"{charter_text.rstrip()}\n{term}\n")


def test_canonical_form_holds_no_floats_and_no_defaults_left_out(charter):
    def leaves(value):
        if isinstance(value, dict):
            return [leaf for item in value.values() for leaf in leaves(item)]
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list) else [value]

    document = json.loads(charter.canonical())
    assert {type(leaf) for leaf in leaves(document)} == {str, int}
    assert document["plan"]["average_last"] == 1
    assert document["plan"]["minimum_sites"] == 2
    assert document["privacy"]["delta"] == "0.00001"
    assert [site["weight"] for site in document["sites"]] == ["100", "50", "70"]


def test_altered_canonical_text_is_no_charter(charter):
    text = charter.canonical().decode()
    for old, new in (
        ('"rounds":3', '"rounds":3.0'),
        ('"epsilon":"3"', '"epsilon":"3.0"'),
        ('"out":1', '"out":2'),
        ('"task":"binary"', '"task":"binary","x":1'),
    ):
        assert old in text
        with pytest.raises(CharterError):
            Charter.from_canonical(text.replace(old, new))


def test_open_noise_is_answered_with_the_number_it_needs(charter_text):
    with pytest.raises(CharterError) as caught:
        Charter.parse(charter_text.replace("noise_multiplier: 3", "noise_multiplier: TODO"))
    needed = caught.value.problems[0].fix.removeprefix("write noise_multiplier: ")
    from federation.accounting import plan_cost

    assert plan_cost(
        Charter.parse(charter_text.replace("noise_multiplier: 3", f"noise_multiplier: {needed}"))
    ).fits
    barely = Decimal(needed) * Decimal("0.99")
    assert not plan_cost(
        Charter.parse(charter_text.replace("noise_multiplier: 3", f"noise_multiplier: {barely}"))
    ).fits


def test_draft_reads_the_header_and_no_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"age,sex,y\n\xff\xfe these bytes are not even text\n")
    assert read_header(path) == ["age", "sex", "y"]


def test_draft_leaves_every_bound_open_and_loads_once_filled(tmp_path):
    text = draft_charter(
        ["pid", "age", "odd name", "y"], label="y", leave_out=["pid"], types={"age": "integer"}
    )
    with pytest.raises(CharterError) as caught:
        Charter.parse(text)
    open_paths = {problem.path for problem in caught.value.problems}
    assert {"features[0].lower", "features[1].upper", "privacy.epsilon", "sites[0].identity"} <= open_paths
    assert "pid" not in text
    filled = (
        text.replace("lower: TODO, upper: TODO", "lower: 0, upper: 99")
        .replace("[TODO negative, TODO positive]", '["no", "yes"]')
        .replace("unit: TODO", 'unit: ""')
        .replace("purposes: [TODO]", "purposes: [care]")
        .replace("epsilon: TODO", "epsilon: 3")
        .replace("noise_multiplier: TODO", "noise_multiplier: 9")
        .replace(
            '{name: TODO, identity: "TODO", nominal_rows: TODO}',
            f'{{name: a, identity: "{SigningKey.generate().text}", nominal_rows: 10}}',
        )
    )
    assert Charter.parse(filled).features[1].name == "odd name"


@pytest.mark.parametrize(
    ("columns", "arguments"),
    [
        (["a", "b"], {"label": "y"}),
        (["a", "a", "y"], {"label": "y"}),
        (["a", "y"], {"label": "y", "task": "ranking"}),
        (["a", "y"], {"label": "y", "types": {"a": "text"}}),
    ],
)
def test_draft_refuses_what_it_cannot_draft(columns, arguments):
    with pytest.raises(FederationError):
        draft_charter(columns, **arguments)
