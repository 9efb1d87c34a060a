"""What a report must say of a forgery, and the small lies that tests put together."""

from __future__ import annotations

from dataclasses import replace

from audit.entries import (
    decode_entry,
)
from audit.evidence import read_evidence, write_evidence
from audit.verify import Verdict, Word

CHECKPOINT, INCLUSION, LINKS = "The log's checkpoint", "Every entry is in the log", "The chain of references"
CHARTER, SITES, RUN = "The charter", "The sites and their keys", "The training run"
ROUNDS, REPLAY, WEIGHTS = "The rounds and their statements", "The aggregation", "The model's weights"
ODOMETERS, EPSILON = "The odometers", "Epsilon"
METRICS, GATES, APPROVALS = "The rounds' metrics", "The gates", "The approvals"
DECISION, ANSWER, RECEIPT = "The decision to answer", "The answer", "The receipt"


def assert_caught(report, title, code, verdict=Verdict.INVALID):
    step = report.step(title)
    assert (report.verdict, step.code) == (verdict, code), report.text()
    assert report.exit_code not in (0, 2)
    if verdict is Verdict.INVALID:
        first = report.failures[0]
        assert first.title == title, report.text()
        assert first.detail
    return step


def once(change, when=lambda body: True):
    """A hook that changes the first body for which `when` holds."""
    done = []

    def hook(world, body):
        if done or not when(body):
            return body
        done.append(body)
        return change(body) if change else None

    return hook


def in_round(number, site=None):
    return lambda body: body.round == number and site in (None, getattr(body, "site", None))


def says(report, title, word, code="ok", verdict=None):
    step = report.step(title)
    assert (step.word, step.code) == (word, code), report.text()
    if verdict is not None:
        assert report.verdict is verdict, report.text()
    return step


def fails(report, title, code):
    step = says(report, title, Word.FAIL, code, Verdict.INVALID)
    assert report.failures[0].title == title, report.text()
    return step


def without(data, gone):
    """The file without the entries for which `gone(index, body)` holds: the operator chooses what to show."""
    evidence = read_evidence(data)
    entries = {i: leaf for i, leaf in evidence.entries.items() if not gone(i, decode_entry(leaf).body)}
    proofs = {i: proof for i, proof in evidence.proofs.items() if i in entries}
    return write_evidence(replace(evidence, entries=entries, proofs=proofs))


def again(world, index):
    """Log the very body of a leaf a second time, in a fresh envelope; return index and leaf hash."""
    body = decode_entry(world.log.leaves[index]).body
    return world.append(body)
