"""One row more, less or broken: everything an agent says is the same but for the noised update itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

from audit.canonical import canonical_bytes
from audit.weights import decode_update

BASE = "age,dose,arm,outcome\n" + "".join(
    f"{20 + i},{5 + i},drug,{'yes' if i % 2 else 'no'}\n" for i in range(12)
)
NEIGHBOURS = {
    "one row more": BASE + "99,999,placebo,yes\n",
    "one row less": BASE[: BASE.rstrip("\n").rfind("\n") + 1],
    "one other row": BASE.replace("20,5,drug,no", "97,900,placebo,yes"),
    "one malformed row": BASE + "abc,,vaccine\n",
    "one NaN": BASE + "NaN,10,drug,yes\n",
    "no rows": "age,dose,arm,outcome\n",
}


@pytest.fixture
def speak(network, request_of):
    """Return `speak(data) -> (statement, update, sizes)`: a first round on those data, in a run apart."""
    network.sign()
    agent = network.agents["alpha"]
    spoken = []

    def speak(data):
        agent.home.config.data.write_text(data, encoding="utf-8")
        network.run = f"run-{len(spoken):04d}"
        network.propose(only="alpha")
        header = network.round_header(1, "alpha")
        raw, blobs = agent.handle("round", canonical_bytes(header), {"base_model": network.base})
        document = json.loads(raw)
        assert "statement" in document, document
        spoken.append(document)
        request_of(agent, "run.finished", {"run": network.run})
        return document["statement"], blobs["update"], (len(raw), len(blobs["update"]))

    return speak


FREE = {"update", "signature", "run", "sequence", "previous_event"}  # the last three count releases, not rows


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_all_but_the_update_is_the_same_on_neighbouring_data(speak, neighbour):
    first, update, sizes = speak(BASE)
    second, other, other_sizes = speak(NEIGHBOURS[neighbour])
    assert {k: v for k, v in first.items() if k not in FREE} == {
        k: v for k, v in second.items() if k not in FREE
    }
    assert sizes == other_sizes
    assert len(decode_update(update)) == len(decode_update(other))


def test_two_sites_with_the_same_data_draw_different_noise(network):
    network.start()
    updates = [decode_update(network.ask(site, 1)[1]) for site in ("alpha", "beta")]
    assert not np.array_equal(*updates)
    sigma = (
        network.agents["alpha"]
        .ledger.releases(network.agents["alpha"].population)[0]
        .statement.event.sigma_grid
    )
    apart = np.subtract(*updates) / (sigma * 2**0.5)
    assert np.abs(apart).max() < 7  # the same sums, apart by noise alone
    assert np.abs(apart).max() > 1e-3


def test_two_releases_of_one_site_draw_different_noise(speak):
    first, second = decode_update(speak(BASE)[1]), decode_update(speak(BASE)[1])
    assert sum(a == b for a, b in zip(first, second, strict=True)) == 0


def test_seeding_torch_and_numpy_changes_nothing(speak):
    import torch

    torch.manual_seed(1)
    np.random.seed(1)
    first = decode_update(speak(BASE)[1])
    torch.manual_seed(1)
    np.random.seed(1)
    assert decode_update(speak(BASE)[1]) != first


def test_what_a_site_says_before_the_round_does_not_depend_on_rows(network):
    """Acceptance and undelivered are the same whether a row is there or not."""
    network.sign()
    agent = network.agents["alpha"]
    answers, sizes = [], []
    changing = {"run", "start", "signature", "site_log_root", "site_log_size"}
    for name, data in {"base": BASE, **NEIGHBOURS}.items():
        agent.home.config.data.write_text(data, encoding="utf-8")
        network.run = "run-" + name.replace(" ", "-")
        acceptance = network.propose(only="alpha")["alpha"]["acceptance"]
        agent.handle("run.finished", b'{"run":"%s"}' % network.run.encode(), {})
        answers.append({key: value for key, value in acceptance.items() if key not in changing})
        sizes.append(acceptance["site_log_size"])
    assert all(answer == answers[0] for answer in answers)
    assert len(set(np.diff(sizes))) == 1, "nor does what the site enters in a log of its own"
