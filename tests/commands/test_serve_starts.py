"""`affidavit serve` that cannot start: the reason in one line, exit code 1, and nothing of others touched."""

from __future__ import annotations

import socket

import pytest


@pytest.mark.parametrize(
    ("environ", "options", "said"),
    [
        ({"AFFIDAVIT_OIDC_ISSUER": "foo", "AFFIDAVIT_OIDC_AUDIENCE": "bar"}, [], "oidc"),
        ({"AFFIDAVIT_MTLS_HEADER": "x"}, [], "mtls"),
        ({"AFFIDAVIT_OTLP_ENDPOINT": "collector:4318"}, [], "otlp_endpoint"),
        ({}, ["--port", "8123", "--grpc-port", "8123"], "grpc_port"),
    ],
)
def test_one_worker_that_cannot_start_says_why_in_one_line_and_exits_with_1(
    own, monkeypatch, environ, options, said
):
    own.approve()
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    result = own.run("serve", *(options or ["--port", "0"]))
    assert result.code == 1
    last = result.err.splitlines()[-1]
    assert last.startswith("error server.settings: ")
    assert said in last
    assert "Traceback" not in result.err


def test_grpc_port_that_is_taken_is_no_start(own):
    own.approve()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = own.run("serve", "--port", "0", "--grpc-port", port)
    assert result.code == 1
    assert port in result.err.splitlines()[-1]
    assert "Traceback" not in result.err


def test_second_server_that_cannot_start_leaves_the_metrics_of_the_first_alone(own):
    kept = own.homes / "coordinator" / "metrics" / "counter_1.db"
    kept.parent.mkdir()
    kept.touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = own.run("serve", "--workers", "2", "--port", str(taken.getsockname()[1]))
    assert result.code == 1
    assert [path.name for path in kept.parent.iterdir()] == ["counter_1.db"]


@pytest.mark.parametrize("host", ["192.0.2.1", "x" * 70])
def test_host_that_is_not_ours_is_not_put_on_the_port(own, host):
    result = own.run("serve", "--port", "0", "--host", host)
    assert result.code == 1
    assert "--host" in result.err.splitlines()[-1]
    assert "--port" not in result.err.splitlines()[-1]


def test_port_in_use_is_named(own):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = own.run("serve", "--port", str(taken.getsockname()[1]))
    assert result.code == 1
    assert "in use" in result.err
