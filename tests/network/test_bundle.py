"""The bundle is the same bytes wherever it is made, and brings of the clients the relay alone."""

from __future__ import annotations

import io
import zipfile

from federation.network.bundle import RELAY_FILES, build_bundle, bundle_digest, bundle_files


def test_same_sources_make_the_same_bundle():
    first = build_bundle()
    build_bundle.cache_clear()
    assert bundle_digest(build_bundle()) == bundle_digest(first)


def test_bundle_holds_of_the_clients_the_relay_alone_and_no_secret_file():
    with zipfile.ZipFile(io.BytesIO(build_bundle())) as archive:
        names = archive.namelist()
    clients = {name for name in names if name.startswith("clients/")}
    assert clients == {f"clients/{name}" for name in RELAY_FILES}
    assert {name.split("/")[0] for name in names} == {
        "audit", "federation", "clients", "pyproject.toml", ".info",
    }  # fmt: skip


def test_bundle_brings_every_module_of_the_server_app():
    assert {"federation/server_app.py", "federation/rounds.py", "audit/entries.py"} <= set(bundle_files())
