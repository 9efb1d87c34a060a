"""Asking sites whose people have to decide."""

from __future__ import annotations

from federation.exchange import Answer, Request
from federation.patience import ask_patiently

REQUEST = Request(kind="run.propose", header={})


class Sites:
    """Answers `waiting_for_site` so many times a site, then "yes"; time passes by sleeping alone."""

    def __init__(self, **waits):
        self.waits, self.asked, self.now, self.pauses = dict(waits), [], 0.0, []

    def ask(self, requests, *, timeout_s, group_id="", trouble_s):
        assert trouble_s == timeout_s, "who restarts before the first round is waited for as long as anybody"
        self.asked.append(sorted(requests))
        answers = {}
        for site in requests:
            self.waits[site] -= 1
            header = {"error": "waiting_for_site"} if self.waits[site] >= 0 else {"acceptance": site}
            failure = "agent error" if self.waits[site] >= 0 else ""
            answers[site] = (Answer(site=site, header=header, failure=failure), None)
        return answers

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds

    def carry_out(self, patience_s=60.0, waiting=None):
        return ask_patiently(
            self,
            dict.fromkeys(self.waits, REQUEST),
            timeout_s=1.0,
            patience_s=patience_s,
            waiting=waiting,
            sleep=self.sleep,
            monotonic=lambda: self.now,
        )


def test_sites_that_answer_at_once_are_asked_once():
    sites = Sites(alpha=0, beta=0)
    answers = sites.carry_out()
    assert sites.asked == [["alpha", "beta"]]
    assert answers["alpha"][0].header == {"acceptance": "alpha"}
    assert sites.pauses == []


def test_only_those_that_wait_are_asked_again_and_ever_less_often():
    sites, told = Sites(alpha=0, beta=3), []
    answers = sites.carry_out(waiting=told.append)
    assert sites.asked == [["alpha", "beta"], ["beta"], ["beta"], ["beta"]]
    assert answers["beta"][0].header == {"acceptance": "beta"}
    assert sites.pauses == sorted(sites.pauses)
    assert told == [("beta",)]


def test_patience_ends_and_the_last_answer_stands():
    sites = Sites(alpha=10_000)
    answers = sites.carry_out(patience_s=30.0)
    assert answers["alpha"][0].header == {"error": "waiting_for_site"}
    assert sites.now <= 30.0
    assert len(sites.asked) < 20


def test_without_patience_nobody_is_asked_twice():
    sites = Sites(alpha=5)
    sites.carry_out(patience_s=0.0)
    assert sites.asked == [["alpha"]]
