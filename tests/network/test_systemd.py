"""The unit that `site join --systemd` writes: systemd itself says whether it can be started."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clients.errors import HomeError
from clients.network.systemd import unit_text, write_unit


def parsed(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def test_the_unit_says_how_to_start_stop_and_restart_a_site(tmp_path):
    unit = parsed(write_unit(tmp_path, "st-mary", tmp_path / "homes", "affidavit").read_text())
    service = unit["Service"]
    assert service["ExecStart"] == (
        f"{sys.executable} -P -m affidavit site up st-mary --home {tmp_path / 'homes'}"
    )
    assert service["ExecStop"].endswith(f"site down st-mary --home {tmp_path / 'homes'}")
    assert (service["User"], service["Restart"], service["LimitCORE"]) == ("affidavit", "always", "0")
    assert service["ReadWritePaths"] == str(tmp_path / "homes")
    assert unit["Install"]["WantedBy"] == "multi-user.target"


@pytest.mark.parametrize("folder", ["with space", "with%percent", 'with"quote'])
def test_a_folder_that_a_unit_cannot_name_is_refused(tmp_path, folder):
    with pytest.raises(HomeError, match="systemd"):
        unit_text("st-mary", tmp_path / folder, "affidavit")


@pytest.mark.parametrize("user", ["", "root;reboot", "a\nExecStart=/bin/sh", "-x"])
def test_a_user_is_a_name_and_no_further_line(tmp_path, user):
    with pytest.raises(HomeError, match="user"):
        unit_text("st-mary", tmp_path, user)


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd here; the parser above judges"
)
def test_systemd_takes_the_unit(tmp_path):
    home = Path("/var/lib/affidavit")
    path = tmp_path / "affidavit-site-st-mary.service"
    path.write_text(unit_text("st-mary", home, "root"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if path.name in line]
    assert (done.returncode, said) == (0, []), done.stderr
