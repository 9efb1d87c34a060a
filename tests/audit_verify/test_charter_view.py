from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.canonical import canonical_bytes
from audit.charter_view import CharterFormError, read_charter


@pytest.fixture
def document(honest):
    return json.loads(honest.world.canonical)


def at(document, path):
    *parents, last = path
    for key in parents:
        document = document[key]
    return document, last


def test_the_view_holds_what_later_steps_compare_with(honest):
    charter = read_charter(honest.world.canonical)
    assert (charter.rounds, charter.dimension, charter.site_names) == (4, 7, ("east", "north", "west"))
    assert charter.site("east").nominal_rows == 60
    assert charter.site("south") is None


CHANGES = [
    (("affidavit",), 2),
    (("name",), 5),
    (("task",), "clustering"),
    (("features",), []),
    (("features",), {}),
    (("features", 0, "type"), "text"),
    (("features", 0, "lower"), "10"),
    (("features", 0, "lower"), 0),
    (("features", 0, "transform"), "sqrt"),
    (("features", 0, "missing"), "ignore"),
    (("features", 1, "name"), "alpha"),
    (("label", "classes"), ["yes"]),
    (("label", "classes"), ["yes", "yes"]),
    (("label", "classes"), ["a", "b", "c"]),
    (("model", "layers"), []),
    (("model", "layers", 0, "in"), 4),
    (("model", "layers", 0, "out"), 2),
    (("model", "layers", 0, "layer"), "batch_norm"),
    (("model", "layers", 1, "sites"), 4),
    (("plan", "rounds"), 0),
    (("plan", "rounds"), "4"),
    (("plan", "rounds"), True),
    (("plan", "average_last"), 5),
    (("plan", "minimum_sites"), 4),
    (("plan", "strategy"), "fedprox"),
    (("plan", "beta1"), "1"),
    (("plan", "tau"), "0"),
    (("plan", "learning_rate"), "-1"),
    (("plan", "learning_rate"), "1.0"),
    (("privacy", "epsilon"), "0"),
    (("privacy", "epsilon"), "-3"),
    (("privacy", "delta"), "1"),
    (("privacy", "delta"), "1e-5"),
    (("privacy", "sample_rate"), "1.5"),
    (("privacy", "noise_multiplier"), "0"),
    (("privacy", "max_grad_norm"), "0"),
    (("privacy", "grid_bits"), 63),
    (("privacy", "relation"), "none"),
    (("privacy", "unit"), "subject"),
    (("privacy", "precision"), "float16"),
    (("sites",), []),
    (("sites", 0, "name"), "North"),
    (("sites", 0, "name"), "zulu"),
    (("sites", 0, "identity"), "ed25519:AAAA"),
    (("sites", 0, "nominal_rows"), 0),
    (("sites", 0, "weight"), "0"),
    (("public_set", "digest"), "abc"),
    (("public_set", "rows"), 0),
    (("gates", 0, "metric"), "r2"),
    (("gates", 0, "source"), "sites"),
    (("gates", 0, "floor"), "high"),
    (("gates", 0, "margin_over_baseline"), None),
    (("purposes",), "triage"),
    (("purposes",), ["triage", "triage"]),
    (("officers", 0, "key"), "me"),
]


@pytest.mark.parametrize(
    ("path", "value"), CHANGES, ids=lambda part: ".".join(map(str, part)) if isinstance(part, tuple) else None
)
def test_a_malformed_value_is_a_typed_error_that_names_its_key(document, path, value):
    parent, last = at(document, path)
    parent[last] = value
    with pytest.raises(CharterFormError) as caught:
        read_charter(canonical_bytes(document))
    assert caught.value.field.split("[")[0].split(".")[0] in (path[0], "model", "features")


def paths(value, prefix=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*prefix, key)
            yield from paths(item, (*prefix, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from paths(item, (*prefix, index))


def test_a_missing_or_an_unknown_key_is_refused_everywhere(document):
    optional = {("public_set",), ("gates", 0, "margin_over_baseline")}
    for path in list(paths(document)):
        changed = copy.deepcopy(document)
        parent, last = at(changed, path)
        if path not in optional:
            without = copy.deepcopy(changed)
            parent_of_copy, _ = at(without, path)
            del parent_of_copy[last]
            with pytest.raises(CharterFormError):
                read_charter(canonical_bytes(without))
        parent["misspelt"] = parent[last]
        with pytest.raises(CharterFormError):
            read_charter(canonical_bytes(changed))


@given(st.data())
def test_any_value_anywhere_raises_only_the_declared_error(honest, data):
    document = json.loads(honest.world.canonical)
    parent, last = at(document, data.draw(st.sampled_from(list(paths(document)))))
    values = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(max_size=8)
    parent[last] = data.draw(
        values | st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values)
    )
    try:
        read_charter(canonical_bytes(document))
    except CharterFormError:
        return


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b'{"a":1,"a":2}', b'{ "a": 1}', b"\xff"])
def test_bytes_that_are_no_canonical_object_are_refused(data):
    with pytest.raises(CharterFormError):
        read_charter(data)
