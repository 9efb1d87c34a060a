"""The lines that processes write about themselves: a fixed list of fields, and never an exception's text."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from audit import log_lines
from audit.log_lines import FIELDS, LogFormatError, form_of

SECRET = "patient-17"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root, stream = logging.getLogger(), io.StringIO()
    before, level = list(root.handlers), root.level
    yield stream
    root.handlers[:] = before
    root.setLevel(level)


@pytest.mark.parametrize("form", ["ecs", "text"])
def test_exception_is_its_type_and_places_and_never_its_text(
    stream: io.StringIO, form: log_lines.Format
) -> None:
    log_lines.configure(form, "WARNING", stream=stream)
    try:
        try:
            int(SECRET)
        except ValueError as error:
            raise KeyError(SECRET) from error
    except KeyError:
        logging.getLogger("clients.agent").exception("site %s could not answer", "alpha")
    said = stream.getvalue()
    assert "site alpha could not answer" in said
    assert "KeyError" in said
    assert "ValueError" in said
    assert "test_log_lines.py" in said
    assert SECRET not in said


def test_line_is_one_json_document_of_known_fields(stream: io.StringIO) -> None:
    log_lines.configure("ecs", "WARNING", stream=stream)
    logger = logging.getLogger("clients.loader")
    logger.info("below the level")
    fields = {"row": SECRET, "event.action": object(), "message": "replaced"}
    logger.warning("two\nlines of %s", "alpha", extra={"ecs": fields})
    logger.warning("not a mapping", extra={"ecs": SECRET})
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert set(first) | set(second) <= FIELDS
    assert (first["message"], first["event.action"]) == ("replaced", "object")
    assert (second["message"], second["log.level"], second["log.logger"]) == (
        "not a mapping", "warning", "clients.loader"
    )  # fmt: skip
    assert second["@timestamp"].endswith("Z")
    assert len(second["@timestamp"]) == len("2026-11-30T04:00:00.000Z")


def test_form_comes_from_the_environment_and_a_misspelt_one_is_refused() -> None:
    assert [form_of({}), form_of({log_lines.FORM: "text"}), form_of({log_lines.FORM: ""})] == [
        "ecs",
        "text",
        "ecs",
    ]
    for other in ("json", "ECS", "ecs ", "x" * 500):
        with pytest.raises(LogFormatError) as caught:
            form_of({log_lines.FORM: other})
        assert caught.value.code == "log.format"
        assert len(str(caught.value)) < 100
