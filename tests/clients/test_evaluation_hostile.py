"""An untrusted coordinator asks for counts: once, after the last round, of a charter that agreed to it."""

from __future__ import annotations

import pytest

from audit.models import model_file
from audit.weights import decode_update
from federation.charter import Charter

EVALUATION = "evaluation: {share: 0.5, noise_multiplier: 2}\n"


@pytest.fixture
def agreed(build_network):
    """One round, and counts after it."""
    network = build_network(rounds=1)
    text = network.charter.to_yaml()
    network.charter = Charter.parse(text + EVALUATION)
    network.start()
    return network


def code(document):
    return document.get("refusal", {}).get("reason") or document.get("error", "none")


def other_model(network):
    layers = [dict(layer) for layer in network.charter.layers]
    return model_file(layers, [v + 1.0 for v in network.theta])


def test_counts_come_once_after_the_last_round(agreed):
    assert code(agreed.ask("alpha", 2)[0]) == "unwitnessed_history"
    agreed.play(1)
    document, update = agreed.ask("alpha", 2)
    event = document["statement"]["event"]
    assert (event["dimension"], event["grid_bits"], document["statement"]["sequence"]) == (4, 16, 2)
    assert len(decode_update(update)) == 4
    again, same = agreed.ask("alpha", 2)
    assert (again, same) == (document, update), "the same question has the same answer and no second cost"
    assert code(agreed.ask("alpha", 2, other_model(agreed))[0]) == "already_released"
    assert code(agreed.ask("alpha", 3)[0]) == "round_out_of_order"
    agent = agreed.agents["alpha"]
    assert agent.ledger.head(agent.population).sequence == 2


def test_the_averaged_weights_may_be_any_but_must_be_the_charters_model(agreed):
    agreed.play(1)
    assert code(agreed.ask("beta", 2, b"no model")[0]) == "base_model_mismatch"
    assert "statement" in agreed.ask("beta", 2, other_model(agreed))[0]


def test_a_plan_without_evaluation_answers_no_question_of_it(network):
    network.start()
    for number in (1, 2, 3):
        network.play(number)
    assert code(network.ask("alpha", 4)[0]) == "round_out_of_order"


def test_the_whole_plan_is_reserved_with_its_counts(agreed):
    agent = agreed.agents["gamma"]
    (reservation,) = agent.ledger.open_reservations(agent.population)
    assert [event.dimension for event in reservation.planned] == [agreed.charter.dimension, 4]
