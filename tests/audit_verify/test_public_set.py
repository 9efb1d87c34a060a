from __future__ import annotations

import pytest

from audit.public_set import PublicSetError, read_public_set

FEATURES = [{"name": "x", "type": "number", "unit": "", "lower": "0", "upper": "2", "missing": "refuse"}]
CLASSES = {"name": "y", "classes": ["no", "yes"]}


def test_rows_are_encoded_and_labels_become_class_indices():
    rows, labels = read_public_set(b"site,x,y\na,0,yes\nb,2,no\n\n", FEATURES, CLASSES)
    assert (rows, labels) == ([[-1.0], [1.0]], [1.0, 0.0])
    _, values = read_public_set(b"x,y\n1,2.5\n1,99\n", FEATURES, {"name": "y", "lower": "0", "upper": "10"})
    assert values == [2.5, 10.0]


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "lacks"),
        (b"x\n1\n", "'y'"),
        (b"x,x,y\n1,1,yes\n", "twice"),
        (b"x,y\n", "no rows"),
        (b"x,y\n1\n", "line 2"),
        (b"x,y\n1,yes\n,yes\n", "line 3"),
        (b"x,y\n1,maybe\n", "column y"),
        (b"x,y\nmany,yes\n", "x:"),
        (b"\xff\xfe", "UTF-8"),
        (b'x,y\n"1,yes\n', "CSV"),
    ],
)
def test_a_bad_public_set_is_named(data, named):
    with pytest.raises(PublicSetError, match=named):
        read_public_set(data, FEATURES, CLASSES)


def test_a_label_that_is_no_number_is_named():
    with pytest.raises(PublicSetError, match="line 2, column y"):
        read_public_set(b"x,y\n1,high\n", FEATURES, {"name": "y", "lower": "0", "upper": "10"})
