"""The relay's forks, and bundles that are unpacked once: what later messages read no bundle has written."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from clients.errors import LinkError
from clients.network.warm_relay import ForkExecutor
from clients.unpacked import COMPILED, KEPT, BundleStore, Unpacker, _compile, is_whole

DIGEST = "ab" * 32


def spec(digest: str | None = DIGEST) -> SimpleNamespace:
    return SimpleNamespace(runtime_api_address="127.0.0.1:9", token="secret-token", fab_hash=digest)


def settled(executor: ForkExecutor) -> None:
    until = time.monotonic() + 60
    while executor._forks:
        assert time.monotonic() < until
        executor.reconcile()
        time.sleep(0.01)


def test_each_task_is_a_fork_with_its_arguments_and_none_of_our_descriptors(tmp_path):
    told = tmp_path / "told"
    kept = os.open(tmp_path, os.O_RDONLY)

    def start(arguments, place):
        try:
            os.fstat(kept)
            is_open = "open"
        except OSError:
            is_open = "closed"
        told.write_text(" ".join([*arguments, str(place.parent.name), is_open]))

    executor = ForkExecutor(start, BundleStore(tmp_path / "bundles"))
    executor.launch(spec())
    settled(executor)
    os.close(kept)
    assert told.read_text() == (
        "--runtime-api-address 127.0.0.1:9 --token secret-token --insecure bundles closed"
    )
    assert list((tmp_path / "bundles").iterdir()) == []  # nothing was unpacked, nothing is left


@pytest.mark.parametrize("ending", [SystemExit(3), RuntimeError("boom"), KeyboardInterrupt()])
def test_a_fork_never_comes_back(tmp_path, ending, capfd):
    def start(arguments, place):
        raise ending

    executor = ForkExecutor(start, BundleStore(tmp_path / "bundles"))
    executor.launch(spec(None))
    settled(executor)


def test_closing_ends_the_forks(tmp_path):
    executor = ForkExecutor(lambda *_: time.sleep(60), BundleStore(tmp_path / "bundles"))
    executor.launch(spec(None))
    executor.close()
    settled(executor)


def test_a_fork_that_is_told_to_end_as_soon_as_it_exists_runs_no_handler_of_its_parents(tmp_path):
    """The parent answers SIGTERM in its own way, as Flower's processes do; a fork just ends."""
    answered = tmp_path / "answered"
    before = signal.signal(signal.SIGTERM, lambda *_: answered.write_text("by the parent's handler"))
    try:
        for number in range(20):
            executor = ForkExecutor(lambda *_: time.sleep(60), BundleStore(tmp_path / f"bundles{number}"))
            executor.launch(spec(None))
            executor.close()
            settled(executor)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not answered.exists()


def test_only_what_flower_starts_as_a_clientapp_is_taken(tmp_path):
    from flwr.supercore.constant import TaskType

    executor = ForkExecutor(lambda *_: None, BundleStore(tmp_path / "bundles"))
    assert executor.get_eligible_capacity(set(TaskType))[0] == {TaskType.CLIENT_APP}


@pytest.mark.parametrize("digest", [None, "", "../../etc", "AB" * 32, "ab" * 31, DIGEST + "/x"])
def test_what_is_no_digest_gets_no_place(tmp_path, digest):
    assert BundleStore(tmp_path / "bundles").place(digest) is None
    assert list((tmp_path / "bundles").iterdir()) == []


def test_a_bundle_is_unpacked_once_and_only_when_it_is_what_was_announced(tmp_path):
    from federation.network.bundle import build_bundle

    content = build_bundle()
    digest = hashlib.sha256(content).hexdigest()
    store = BundleStore(tmp_path / "bundles")
    place = store.place(digest)
    with pytest.raises(LinkError, match="announced"):
        Unpacker(place).unpacked(content + b"x")
    assert not is_whole(place)
    unpacker = Unpacker(store.place(digest))
    ready = unpacker.unpacked(content)
    assert is_whole(ready)
    store.settle(ready)
    store.settle(place)  # the first attempt, which came to nothing
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == [digest]
    again = store.place(digest)
    assert is_whole(again)
    assert Unpacker(again).unpacked(content) == again
    (app,) = (again / "apps").iterdir()
    assert (app / "clients" / "client_app.py").is_file()
    for name in COMPILED:
        compiled = Path(importlib.util.cache_from_source(str(app / name)))
        flags = int.from_bytes(compiled.read_bytes()[4:8], "little")
        assert flags == 0b11, "it is bound to its source's digest, which is looked at"


def test_what_is_compiled_is_what_a_relay_loads():
    code = "import sys, clients.client_app, clients.socket_link; print(*sorted(sys.modules))"
    run = [sys.executable, "-c", code]
    loaded = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    own = {name for name in loaded if name.partition(".")[0] in ("audit", "clients", "federation")}
    compiled = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in COMPILED}
    assert compiled == own


def test_a_source_that_is_another_than_the_compiled_one_is_what_runs(tmp_path):
    """Nothing writes there; if something did, the interpreter would run the source."""
    for name in COMPILED:
        (tmp_path / "one" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "one" / name).write_text("SAID = 1\n")
    (tmp_path / "one" / "clients" / "link.py").write_text("this is no Python")
    _compile(tmp_path)
    changed = tmp_path / "one" / "clients" / "errors.py"
    stamp = changed.stat().st_mtime_ns
    changed.write_text("SAID = 2\n")
    os.utime(changed, ns=(stamp, stamp))
    code = "import clients.errors as e, clients.client_app as c; print(e.SAID, c.SAID)"
    run = [sys.executable, "-c", code]
    said = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path / "one").stdout
    assert said.split() == ["2", "1"]


def test_what_is_approved_and_no_bundle_leaves_nothing(tmp_path):
    content = b"approved by mistake"
    store = BundleStore(tmp_path / "bundles")
    place = store.place(hashlib.sha256(content).hexdigest())
    with pytest.raises(LinkError, match="unpacked"):
        Unpacker(place).unpacked(content)
    store.settle(place)
    assert list((tmp_path / "bundles").iterdir()) == []


def test_a_killed_relays_leavings_are_cleared_and_old_bundles_forgotten(tmp_path):
    store = BundleStore(tmp_path / "bundles")
    (tmp_path / "bundles" / f"{DIGEST}.0badcafe").mkdir()
    store = BundleStore(tmp_path / "bundles")
    assert list((tmp_path / "bundles").iterdir()) == []
    for number in range(KEPT + 2):
        place = store.place(f"{number:064x}")
        (place / ".whole").touch()
        store.settle(place)
        os.utime(tmp_path / "bundles" / f"{number:064x}", (number, number))
    names = {path.name for path in (tmp_path / "bundles").iterdir()}
    assert len(names) == KEPT + 1 or len(names) == KEPT
    assert f"{KEPT + 1:064x}" in names
    assert f"{0:064x}" not in names
