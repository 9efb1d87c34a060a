"""The gateway as a process: `python -P -m server.network.serving HOME`, which `coordinator up` starts.

It holds the log open to write who came and went, and no signing key: the log's signer lives in the API.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import sys
from pathlib import Path

import httpx
import uvicorn

from audit.ledger import Ledger
from audit.location import log_location
from federation.network.control import SuperLinkControl
from federation.network.membership import Membership
from federation.network.ringing import GATEWAY, bells_folder
from federation.network.settings import NetworkHome
from server import logs
from server.network.directory import NodeDirectory
from server.network.gateway import Gateway, Limits
from server.network.handshakes import Handshakes
from server.settings import load_settings

_logger = logging.getLogger(__name__)


def build_gateway(home: Path, ledger: Ledger) -> Gateway:
    """Put the parts together for a coordinator's home.

    Raises:
        NetworkError: `coordinator init` was not run, or a setting is wrong.
    """
    network = NetworkHome.open(home)
    settings, pki = network.settings(), network.pki
    membership = Membership(ledger, network.folder)
    control = SuperLinkControl(settings.superlink, pki.inner_ca)
    context = ssl.create_default_context(cafile=str(pki.inner_ca))
    return Gateway(
        membership,
        NodeDirectory(membership.roster, control),
        superlink=httpx.AsyncClient(base_url=f"https://{settings.superlink}", verify=context),
        api=httpx.AsyncClient(base_url=f"http://127.0.0.1:{settings.api_port}"),
        ca_pem=pki.ca.read_bytes(),
        bell=bells_folder(home) / GATEWAY,
        limits=Limits(
            max_body_bytes=settings.max_body_bytes,
            body_timeout_s=settings.body_timeout_s,
            requests_per_s=settings.requests_per_s,
            burst=settings.burst,
        ),
    )


def serve_gateway(home: Path) -> None:
    """Serve until stopped."""
    network = NetworkHome.open(home)
    settings, tls = network.settings(), network.pki.folder
    with Ledger.open(log_location(home)) as ledger:
        config = uvicorn.Config(
            build_gateway(home, ledger),
            host=settings.bind,
            port=settings.port,
            ssl_certfile=str(tls / "server.pem"),
            ssl_keyfile=str(tls / "server.key"),
            log_config=None,  # as the API: `server.logs`
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_keep_alive=30,
            limit_concurrency=1000,
            h11_max_incomplete_event_size=32 << 10,
        )
        asyncio.run(_serve(config, tls / "server.pem", tls / "server.key"))


async def _serve(config: uvicorn.Config, certificate: Path, key: Path) -> None:
    config.load()
    assert config.ssl is not None  # noqa: S101 - the configuration names a certificate
    Handshakes().watch(config.ssl)
    fresh = asyncio.create_task(keep_fresh(config.ssl, certificate, key))
    try:
        await uvicorn.Server(config).serve()
    finally:
        fresh.cancel()


async def keep_fresh(context: ssl.SSLContext, certificate: Path, key: Path, *, every_s: float = 1.0) -> None:
    """Give `context` the certificate in the files whenever they change; connections that stand go on.

    Key and certificate are two files: between the two writes they do not fit, and the next look tries again.
    A context that was given a pair which does not fit serves nobody, so another one tries it first.
    """
    seen = _stamp(certificate)
    while True:
        await asyncio.sleep(every_s)
        now = _stamp(certificate)
        if now == seen:
            continue
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
            context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            _logger.warning("the new certificate is not taken yet: %s", error)
            continue
        seen = now
        _logger.info("serving a new certificate")


def _stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def main() -> None:
    home = Path(sys.argv[1])
    settings = load_settings(flags={"coordinator_home": home}).settings
    logs.configure(settings.log_format, settings.log_level.upper())
    logging.getLogger("httpx").setLevel(logging.WARNING)
    serve_gateway(home)


if __name__ == "__main__":
    main()
