"""Whose signer a home signs with: moved, copied and mounted homes, and signers on disks of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from audit.errors import LocationError, SignerElsewhereError, SignerMissingError
from audit.signer import Signer
from audit.signing_home import named_for, publish_here, signer_home_of
from federation.coordinator import Coordinator
from server.settings import load_settings

ORIGIN = "log.example.org/signing-home"


def make(base: Path, signer: Path | None = None) -> Path:
    Coordinator.create(base / "coordinator", signer or base / "signer", ORIGIN).close()
    return base


def name(base: Path, signer: Path | str) -> None:
    """Write the signer's home as earlier releases did: an absolute path."""
    path = base / "coordinator" / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "signer_home": str(signer)}))


def of(base: Path, **environ: str) -> Path:
    """Ask both ways to the rule: what signs for a command, and for `affidavit serve --home`."""
    found = signer_home_of(base / "coordinator", environ)
    assert load_settings(environ=environ, base=base).settings.signer_home == found
    return found


def publish(base: Path) -> None:
    with Coordinator.open(base / "coordinator") as coordinator:
        publish_here(base / "coordinator", coordinator.ledger)


def state(base: Path) -> bytes:
    return (base / "signer" / "state.json").read_bytes()


def test_new_home_names_its_signer_by_the_way_to_it(tmp_path):
    base = make(tmp_path / "a")
    assert yaml.safe_load((base / "coordinator/config.yaml").read_text())["signer_home"] == "../signer"
    assert of(base) == base / "signer"


def test_copy_signs_with_its_own_signer_and_the_original_goes_on(tmp_path):
    base, copy = make(tmp_path / "a"), tmp_path / "b"
    shutil.copytree(base, copy)
    before = state(base)
    publish(copy)
    assert state(base) == before
    publish(base)


@pytest.mark.parametrize("has_own", [True, False])
def test_copy_that_names_the_originals_signer_is_refused(tmp_path, has_own):
    base, copy = make(tmp_path / "a"), tmp_path / "b"
    name(base, base / "signer")
    shutil.copytree(base, copy)
    if not has_own:
        shutil.rmtree(copy / "signer")
    before = state(base)
    for ask in (of, publish, lambda base: load_settings(environ={}, base=base)):
        with pytest.raises(SignerElsewhereError) as caught:
            ask(copy)
        assert str(base / "signer") in str(caught.value)
        assert "AFFIDAVIT_SIGNER_HOME" in str(caught.value)
        assert (str(copy / "signer") in str(caught.value)) is has_own
    assert state(base) == before
    assert of(base) == base / "signer"
    name(copy, "../signer")  # as the refusal says
    assert of(copy) == copy / "signer"


def test_moved_home_takes_its_signer_along_however_it_was_named(tmp_path):
    base = make(tmp_path / "a")
    base.rename(tmp_path / "b")
    assert of(tmp_path / "b") == tmp_path / "b" / "signer"
    name(tmp_path / "b", tmp_path / "a" / "signer")
    assert of(tmp_path / "b") == tmp_path / "b" / "signer"
    publish(tmp_path / "b")


def test_home_seen_under_another_name_is_itself(tmp_path):
    base = make(tmp_path / "a")
    name(base, base / "signer")
    (tmp_path / "link").symlink_to(base)
    assert of(tmp_path / "link").samefile(base / "signer")


def test_coordinators_home_that_is_a_link_has_its_signer_beside_the_link(tmp_path):
    base = make(tmp_path / "a")
    (tmp_path / "disk").mkdir()
    (base / "coordinator").rename(tmp_path / "disk" / "coordinator")
    (base / "coordinator").symlink_to(tmp_path / "disk" / "coordinator")
    assert of(base) == base / "signer"


def test_signer_on_a_disk_of_its_own_signs_even_beside_a_left_over_one(tmp_path):
    disk = tmp_path / "disk" / "keys"
    base = make(tmp_path / "a", disk)
    assert of(base) == disk
    shutil.copytree(disk, base / "signer")
    assert of(base) == disk
    publish(base)
    assert Signer.open(disk).state().checkpoint.tree_size == 1
    assert Signer.open(base / "signer").state().checkpoint.tree_size == 0


def test_left_over_signer_does_not_stand_in_for_a_disk_that_is_not_mounted(tmp_path):
    disk = tmp_path / "disk" / "keys"
    base = make(tmp_path / "a", disk)
    shutil.copytree(disk, base / "signer")
    shutil.rmtree(disk)
    with pytest.raises(SignerMissingError, match=str(disk)):
        Coordinator.open(base / "coordinator")


def test_two_homes_over_one_database_may_share_a_signer(tmp_path):
    base, second = make(tmp_path / "a"), tmp_path / "b"
    (second / "coordinator").mkdir(parents=True)
    shutil.copy(base / "coordinator" / "config.yaml", second / "coordinator")
    name(second, base / "signer")
    with pytest.raises(SignerElsewhereError):
        of(second)
    url = "postgresql://affidavit@db.example.org/affidavit"
    assert of(second, AFFIDAVIT_DATABASE=url) == base / "signer"


def test_environment_and_the_servers_own_setting_come_first_for_all(tmp_path):
    base = make(tmp_path / "a")
    assert of(base, AFFIDAVIT_SIGNER_HOME="/elsewhere") == Path("/elsewhere")
    path = base / "coordinator" / "config.yaml"
    path.write_text(path.read_text() + "server: {signer_home: ../third}\n")
    assert of(base) == base / "third"


@pytest.mark.parametrize("text", ["origin: x\n", "signer_home: 7\n", "[]", "a: [", "signer_home: ''\n"])
def test_home_that_names_none_is_told(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(LocationError, match="names no signer_home"):
        signer_home_of(tmp_path, {})


def test_name_is_relative_only_within_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named_for(Path("x/coordinator"), Path("x/keys")) == "../keys"
    assert named_for(Path("x/coordinator"), Path("y/signer")) == str(tmp_path / "y/signer")


def test_new_home_is_its_owners_alone(tmp_path):
    base = make(tmp_path / "new")
    assert (base / "coordinator").stat().st_mode & 0o077 == 0, "models and released updates lie in it"
    assert (base / "signer").stat().st_mode & 0o077 == 0
