"""Settings: flag over environment over file over default, and every mistake named with its source."""

from __future__ import annotations

import re

import pytest

from server.errors import SettingsError
from server.settings import Settings, load_settings, unknown_variables


@pytest.fixture
def base(tmp_path):
    (tmp_path / "coordinator").mkdir()
    return tmp_path


def write(base, text):
    (base / "coordinator" / "config.yaml").write_text(text)


def test_order_of_sources(base):
    write(base, "origin: x\nserver: {port: 1111, host: 10.0.0.1, max_rows: 7}\n")
    loaded = load_settings(
        flags={"port": 3333, "host": None}, environ={"AFFIDAVIT_HOST": "10.0.0.2"}, base=base
    )
    assert (loaded.settings.port, loaded.sources["port"]) == (3333, "flag")
    assert (loaded.settings.host, loaded.sources["host"]) == ("10.0.0.2", "environment AFFIDAVIT_HOST")
    assert (loaded.settings.max_rows, loaded.sources["max_rows"].split()[0]) == (7, "file")
    assert loaded.sources["merge_delay_s"] == "default"


def test_home_from_the_environment(base):
    loaded = load_settings(environ={"AFFIDAVIT_HOME": str(base)})
    assert loaded.settings.coordinator_home == base / "coordinator"
    assert loaded.sources["signer_home"] == "environment AFFIDAVIT_HOME"


@pytest.mark.parametrize(
    ("flags", "environ", "said"),
    [
        ({"port": 70000}, {}, r"port \(from flag\)"),
        ({}, {"AFFIDAVIT_PORT": "http"}, r"port \(from environment AFFIDAVIT_PORT\)"),
        ({}, {"AFFIDAVIT_MAX_ROWS": "0"}, r"max_rows \(from environment AFFIDAVIT_MAX_ROWS\)"),
        ({}, {"AFFIDAVIT_REQUEST_TIMEOUT_S": "-1"}, "request_timeout_s"),
        ({}, {"AFFIDAVIT_BODY_TIMEOUT_S": "nan"}, "body_timeout_s"),
    ],
)
def test_bad_value_names_the_setting_and_its_source(base, flags, environ, said):
    with pytest.raises(SettingsError, match=said):
        load_settings(flags=flags, environ=environ, base=base)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server: {prot: 80}", "unknown settings .*prot"),
        ("server: [1]", "settings by name"),
        ("server: {port: [", "not readable YAML"),
        ("just text", "settings by name"),
    ],
)
def test_bad_file_names_the_file(base, text, said):
    write(base, text)
    with pytest.raises(SettingsError, match=said) as caught:
        load_settings(environ={}, base=base)
    assert "config.yaml" in str(caught.value)


def test_port_of_http_is_no_port_of_grpc():
    with pytest.raises(SettingsError, match="grpc_port: 8000 is the port of HTTP"):
        load_settings(environ={"AFFIDAVIT_GRPC_PORT": "8000"})
    assert load_settings(environ={"AFFIDAVIT_GRPC_PORT": "0", "AFFIDAVIT_PORT": "0"}).settings.grpc_port == 0


@pytest.mark.parametrize(
    ("host", "address"), [("::1", "[::1]:81"), ("127.0.0.1", "127.0.0.1:81"), ("::", "[::]:81")]
)
def test_address_is_one_that_a_browser_takes(host, address):
    assert Settings(host=host).address(81) == address


def test_misspelt_variables_are_told_with_the_one_that_is_meant():
    told = unknown_variables(
        {
            "AFFIDAVIT_WORKER": "2",
            "AFFIDAVIT_QQ": "",
            "AFFIDAVIT_PORT": "1",
            "AFFIDAVIT_HOME": "x",
            "AFFIDAVIT_SERVICE_HOST": "10.0.0.1",
            "AFFIDAVIT_PORT_8000_TCP": "tcp://10.0.0.1:8000",
            "PATH": "y",
        }
    )
    assert told == [
        "AFFIDAVIT_QQ is no setting, and is ignored",
        "AFFIDAVIT_WORKER is no setting, and is ignored; AFFIDAVIT_WORKERS is one",
    ]


def test_every_variable_that_the_code_names_is_known(repository):
    named = set()
    for package in ("audit", "clients", "federation", "server"):
        for path in (repository / package).rglob("*.py"):
            named |= set(re.findall(r"\bAFFIDAVIT_[A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8")))
    assert len(named) > 20
    assert unknown_variables(dict.fromkeys(named, "")) == []


def test_lateness_is_within_what_receipts_promise():
    with pytest.raises(SettingsError, match="merge_delay_s"):
        load_settings(environ={"AFFIDAVIT_CHECKPOINT_LATE_S": "61", "AFFIDAVIT_MERGE_DELAY_S": "60"})
    assert load_settings(environ={"AFFIDAVIT_MERGE_DELAY_S": "60"}).settings.late_s == 60
    assert load_settings(environ={}).settings.late_s == 1_800
