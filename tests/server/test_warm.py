"""Which versions stay in memory: all that answer, and the last ones that others looked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.warm import WarmModels

MOST = 32


class Models(WarmModels):
    """Real but for the files: counts what it loads."""

    def __init__(self, in_use=()):
        self.loaded, self.used = [], set(in_use)
        super().__init__(SimpleNamespace(), lambda: self.used)

    def _load(self, served):
        self.loaded.append(served.version)
        return served.version

    def held(self):
        return [version for version, _ in self._models]


def version(number, charter="c"):
    return SimpleNamespace(version=f"v{number}", charter_digest=charter)


def test_what_answers_is_never_put_out_however_many_there_are():
    models = Models((f"v{n}", "c") for n in range(40))
    for _ in range(3):
        for number in range(40):
            models.get(version(number))
    assert len(models.loaded) == 40


def test_a_testers_look_ups_do_not_put_out_what_answers():
    models = Models({("v0", "c")})
    models.get(version(0))
    for number in range(1, 200):
        models.get(version(number))
    assert models.ready(version(0)) == "v0"
    assert models.loaded.count("v0") == 1
    assert len(models.held()) == MOST + 1


def test_beside_what_answers_the_last_ones_looked_for_stay():
    models = Models({("live", "c")})
    for number in range(MOST):
        models.get(version(number))
    assert models.ready(version(0)) == "v0"  # looked for again, without loading
    models.get(version("new"))
    assert models.ready(version(1)) is None
    assert models.ready(version(0)) == "v0"
    assert len(models.held()) == MOST


def test_what_no_longer_answers_makes_room():
    models = Models({("v0", "c")})
    for number in range(MOST + 1):
        models.get(version(number))
    assert len(models.held()) == MOST + 1
    models.used = set()
    models.get(version("new"))
    assert models.ready(version(0)) is None
    assert len(models.held()) == MOST


def test_the_same_weights_under_another_charter_are_another_model():
    models = Models({("v0", "c")})
    models.get(version(0, "other"))
    models.get(version(0))
    for number in range(1, MOST + 1):
        models.get(version(number))
    assert models.ready(version(0)) is not None
    assert models.ready(version(0, "other")) is None


def test_the_one_that_is_asked_for_now_is_never_put_out_for_itself():
    models = Models()
    for number in range(3 * MOST):
        models.get(version(number))
        assert models.ready(version(number)) == f"v{number}"


@pytest.mark.parametrize("state", ["live", "canary", "shadow"])
def test_what_is_in_use_is_what_answers_or_is_tried(client, lab, state):
    from tests.server.test_trials import trial

    other = lab.version if state == "live" else trial(lab, state)
    lab.register(lab.charter, weights=[0.25] * 7)
    live = client.app.state.context.live
    live.refresh()
    assert live.in_use() == {(lab.version, lab.charter), (other, lab.charter)}
    if state == "live":
        lab.move(lab.version, lab.charter, "live", "retired")
        live.refresh()
        assert live.in_use() == frozenset()


def test_a_look_at_readiness_loads_nothing_again(lab, monkeypatch):
    monkeypatch.setattr("server.warm._KEPT", 2)
    loads, load = [], WarmModels._load
    monkeypatch.setattr(WarmModels, "_load", lambda self, served: loads.append(1) or load(self, served))
    for name in ("one", "two", "three", "four"):
        lab.live(name=name)
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        assert len(loads) == 5
        for _ in range(3):
            assert client.get("/readyz").status_code == 200
        assert len(loads) == 5
