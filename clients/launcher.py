"""Starts a site's Flower ClientApp: asks the agent whether the bundle is approved, and confines it first.

Flower's SuperNode starts `flwr-clientapp` by PATH for every message. `install_stub` writes a script of that
name into a folder which stands first in the SuperNode's PATH; it starts this module with a fresh environment
that holds nothing of the SuperNode's. Here, in this order: resource limits; Landlock, so that neither this
process nor the bundle can open the site's home, signal or trace the agent, or connect elsewhere; Flower pulls
the task; the bundle's bytes are hashed and the agent is asked; only an approved bundle is unpacked and run.

Whatever the bundle then does, it can only ask the agent, which answers as it would answer anybody.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import importlib
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from clients.confinement import Allowance, Confined, Limits, confine, limit
from clients.errors import LinkError
from clients.link import connect
from clients.unpacked import Unpacker

_logger = logging.getLogger(__name__)

STUB: Final = "flwr-clientapp"
_APPS: Final = "apps"  # Flower's own name for the folder of unpacked bundles
NOT_APPROVED: Final = "bundle_not_approved"
_STALE_S: Final = 3600.0
_EMPTY_S: Final = 60.0
_SYSTEM: Final = (
    "/usr", "/lib", "/lib64", "/bin", "/sys/devices/system/cpu",
    "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/loadavg", "/proc/version",
    "/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf",
    "/etc/localtime", "/etc/ld.so.cache", "/etc/mime.types", "/etc/os-release",
)  # fmt: skip
_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_STUB_TEXT: Final = """\
#!/bin/sh
# Made by affidavit: runs an approved bundle, confined, with nothing of the caller's environment.
exec env -i {environment} {python} -I -c {code} {options} -- "$@"
"""
_CODE: Final = "import sys; sys.path.insert(0, {root!r}); from clients.launcher import main; main()"


class BundleNotApprovedError(Exception):
    """The site has not approved this bundle; the text is all that Flower sends to the coordinator."""

    def __init__(self) -> None:
        super().__init__(NOT_APPROVED)


def install_stub(folder: Path, *, agent: str, site: str, scratch: Path) -> Path:
    """Write `flwr-clientapp` into `folder`, which belongs first in the SuperNode's PATH; return its path.

    Args:
        agent: the link to the agent, such as `unix:/run/affidavit/st-mary`.
        scratch: where bundles are unpacked, one private folder a message; the relay user's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "AFFIDAVIT_AGENT": agent,
    }
    options = ["--agent", agent, "--site", site, "--scratch", str(scratch.resolve())]
    root = str(Path(__file__).resolve().parent.parent)
    text = _STUB_TEXT.format(
        environment=" ".join(shlex.quote(f"{name}={value}") for name, value in environment.items()),
        python=shlex.quote(sys.executable),
        code=shlex.quote(_CODE.format(root=root)),
        options=" ".join(shlex.quote(option) for option in options),
    )
    stub = folder / STUB
    stub.write_text(text, encoding="utf-8")
    stub.chmod(0o755)
    return stub


def main(argv: Sequence[str] | None = None) -> None:
    """Run one message's ClientApp; does not return."""
    own, flower = _split(list(sys.argv[1:] if argv is None else argv))
    parser = argparse.ArgumentParser(prog=STUB)
    for name in ("--agent", "--site", "--scratch"):
        parser.add_argument(name, required=True)
    parser.add_argument("--bundle", type=Path, help="where the bundle is, or belongs, unpacked")
    arguments = parser.parse_args(own)
    scratch = Path(arguments.scratch).resolve()  # this process moves into a folder below it
    _sweep(scratch)
    folder = Path(tempfile.mkdtemp(prefix="message-", dir=scratch))
    os.environ.update(FLWR_HOME=str(folder), HOME=str(folder), TMPDIR=str(folder))
    tempfile.tempdir = None
    os.chdir(folder)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    link = connect(arguments.agent, arguments.site)  # loads what it needs while files can be read
    limit(Limits())
    unpacker = None if arguments.bundle is None else Unpacker(arguments.bundle)
    _tell(confine(allowance(folder, _port_of(flower), bundle=arguments.bundle)))

    def install(original: Callable[..., Path], content: bytes, **options: Any) -> None:
        check_bundle(link, content)
        if unpacker is None:
            original(content, **options)
            return
        try:
            (folder / _APPS).symlink_to(unpacker.unpacked(content) / _APPS)
        except LinkError as error:
            _logger.exception("a bundle that is approved could not be unpacked")
            raise BundleNotApprovedError from error  # one code, whatever went wrong

    _run_flower(flower, install)


def check_bundle(link: Any, content: bytes) -> None:
    """Ask the agent about a bundle's bytes; silence is a no.

    Raises:
        BundleNotApprovedError: it is not approved, or nobody could say.
    """
    digest = hashlib.sha256(content).hexdigest()
    header = json.dumps({"digest": digest}, separators=(",", ":")).encode()
    try:
        answer, _ = link.handle("bundle.check", header, {})
        approved = json.loads(answer).get("approved")
    except (LinkError, ValueError, AttributeError) as error:
        _logger.error("the agent could not be asked about bundle %s: %s", digest, error)
        raise BundleNotApprovedError from error
    if approved is not True:
        _logger.error("bundle %s is not approved; see `affidavit site bundle approve`", digest)
        raise BundleNotApprovedError


def allowance(folder: Path, port: int | None, *, bundle: Path | None = None) -> Allowance:
    """Return what a bundle may reach: Python, the system's libraries, its own folder, one port.

    `bundle` is where it lies unpacked, to read.
    """
    prefixes = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix)}
    shared = () if bundle is None else (bundle,)
    return Allowance(
        read=(*sorted(prefixes), *map(Path, _SYSTEM), *shared),
        write=(folder, *map(Path, _DEVICES)),
        tcp_ports=() if port is None else (port,),
    )


def _run_flower(arguments: list[str], install: Callable[..., None]) -> None:
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    run_clientapp: Any = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    run_clientapp.install_from_fab = partial(install, run_clientapp.install_from_fab)
    _leave_no_packages()
    sys.argv = [STUB, *_without_parent(arguments)]
    _end_with(os.getppid())
    flwr_clientapp()


def _leave_no_packages() -> None:
    """The bundle brings packages of these names; it gets its own copies, never this process's."""
    root = str(Path(__file__).resolve().parent.parent)
    sys.path[:] = [entry for entry in sys.path if entry != root or "site-packages" in root]
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("audit", "clients", "federation")
    ]:
        del sys.modules[name]


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        raise SystemExit(f"{STUB}: start it by the stub that install_stub writes")
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _without_parent(arguments: list[str]) -> list[str]:
    """Flower looks whether its parent lives by sending it signal 0, which a confined process may not."""
    if "--parent-pid" not in arguments:
        return arguments
    at = arguments.index("--parent-pid")
    return arguments[:at] + arguments[at + 2 :]


def _end_with(parent: int) -> None:
    """End this process when its parent does."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        signal.raise_signal(signal.SIGINT)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _port_of(arguments: Sequence[str]) -> int | None:
    """The port of the SuperNode's own API, from Flower's command line."""
    for name, value in pairwise(arguments):
        if name == "--runtime-api-address":
            port = value.rpartition(":")[2]
            return int(port) if port.isascii() and port.isdigit() else None
    return None


def _tell(confined: Confined) -> None:
    missing = [
        what
        for what, done in (
            ("files", confined.files),
            ("network", confined.network),
            ("signals", confined.signals),
        )
        if not done
    ]
    if missing:
        _logger.warning(
            "this kernel cannot confine %s; keep relay and agent under different users", ", ".join(missing)
        )


def _sweep(scratch: Path) -> None:
    """Remove what earlier messages left: an empty folder each, or more where a process was killed."""
    for left in scratch.glob("message-*"):
        try:
            age_s = time.time() - left.stat().st_mtime
            if age_s > _STALE_S:
                shutil.rmtree(left, ignore_errors=True)
            elif age_s > _EMPTY_S:
                left.rmdir()
        except OSError:
            continue  # in use, or gone by another message's sweep
