"""Numbers that are handed over later are the numbers that would have been counted at once."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.monitoring import Monitoring
from server.tallies import Tallies

BOUNDS = (0.001, 0.01, 0.1, 1.0)


class Registry:
    """A counter, a histogram with a label and a gauge, and how they read."""

    def __init__(self):
        self.registry = CollectorRegistry(auto_describe=True)
        self.counter = Counter("c", "c", ("k",), registry=self.registry)
        self.histogram = Histogram("h", "h", ("k",), buckets=BOUNDS, registry=self.registry)
        self.gauge = Gauge("g", "g", registry=self.registry)

    def read(self):
        lines = generate_latest(self.registry).decode().splitlines()
        found = dict(
            line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "_created" not in line
        )
        return {name: float(value) for name, value in found.items()}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from([0.0, *BOUNDS, 0.005, 0.5, 2.0, 1e9]))))
def test_what_is_handed_over_is_what_would_have_been_counted(seen):
    later, at_once = Registry(), Registry()

    async def main():
        tallies = Tallies(later.gauge)
        for label, value in seen:
            tallies.count(later.counter.labels(label), 2)
            tallies.observe(later.histogram.labels(label), value)
        tallies.flush()

    asyncio.run(main())
    for label, value in seen:
        at_once.counter.labels(label).inc(2)
        at_once.histogram.labels(label).observe(value)
    found = later.read()
    assert found.keys() == at_once.read().keys()
    assert all(found[name] == pytest.approx(value) for name, value in at_once.read().items())


def test_it_is_handed_over_by_itself_and_once():
    registry = Registry()

    async def main():
        tallies, before = Tallies(registry.gauge), registry.read()
        for _ in range(3):
            tallies.enter()
        tallies.leave()
        tallies.count(registry.counter.labels("a"))
        assert registry.read() | before == registry.read() | {"g": 0.0}, "not yet"
        await asyncio.sleep(0.6)
        first = registry.read()
        tallies.flush()
        return first

    first = asyncio.run(main())
    assert first == registry.read()
    assert (first['c_total{k="a"}'], first["g"]) == (1.0, 2.0)


def test_without_a_loop_nothing_is_kept_back():
    registry = Registry()
    tallies = Tallies(registry.gauge)
    tallies.enter()
    tallies.count(registry.counter.labels("a"))
    assert registry.read() == {"g": 1.0, 'c_total{k="a"}': 1.0}


def test_loop_that_ends_takes_no_number_with_it():
    registry = Registry()
    tallies = Tallies(registry.gauge)

    async def one():
        tallies.count(registry.counter.labels("a"))

    asyncio.run(one())
    asyncio.run(one())
    tallies.flush()
    assert registry.read()['c_total{k="a"}'] == 2.0


def test_whoever_reads_the_metrics_reads_what_was_counted_a_moment_ago():
    async def main():
        monitoring = Monitoring()
        monitoring.answered("POST", "/x", 200, 0.004)
        monitoring.predicted("toy", 3)
        monitoring.scored("toy", "bounds", 0.7, True)
        return monitoring.render().decode()

    text = asyncio.run(main())
    assert 'affidavit_http_requests_total{method="POST",route="/x",status="200"} 1.0' in text
    assert 'affidavit_http_request_seconds_bucket{le="0.005",route="/x"} 1.0' in text
    assert 'affidavit_http_request_seconds_bucket{le="0.0025",route="/x"} 0.0' in text
    assert 'affidavit_predicted_rows_total{model="toy"} 3.0' in text
    assert 'affidavit_ood_rows_total{basis="bounds",model="toy"} 1.0' in text


def test_numbers_of_several_threads_with_loops_of_their_own_processes_are_not_mixed():
    """Each process has its own; two threads with tallies of their own and one registry lose nothing."""
    registry = Registry()

    def count():
        async def main():
            tallies = Tallies(registry.gauge)
            for _ in range(1_000):
                tallies.count(registry.counter.labels("a"))
            tallies.flush()

        asyncio.run(main())

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.read()['c_total{k="a"}'] == 4_000.0
