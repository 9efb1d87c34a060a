"""The relay kept warm: the SuperExec of one SuperNode, which has Flower imported and forks for each message.

Flower starts a process for every message, and importing Flower is nearly all that such a process does. This
one runs Flower's own SuperExec loop with an executor that forks; the fork asks the agent whether the bundle
is approved, confines itself and runs it (`clients.launcher`). The SuperNode rings when it has taken a message
in (`federation.network.bell`), so nothing looks for work in short turns.

SuperNode gives tasks to nobody but who knows the secret of the two, a file of the site's own user. This
process holds that secret and nothing else: no data, no node key, no model. A fork has none of its
descriptors, yet its memory: what a bundle could learn there is how to take a message meant for itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from clients.unpacked import BundleStore
from federation.network.bell import Bell, with_sleep

_logger = logging.getLogger(__name__)

PRELOAD: Final = (
    "flwr.supernode.runtime.run_clientapp",
    "flwr.supernode.cli.flwr_clientapp",
    "flwr.clientapp",
    "flwr.app",
    "clients.launcher",
)
KEPT_ENVIRONMENT: Final = (
    "PATH", "LANG", "FLWR_HOME", "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION",
)  # fmt: skip
LOOK_S: Final = 5.0  # how long to wait for the bell; what was not rung for is found then
_LAST_DESCRIPTOR: Final = 4096

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)

Start = Callable[[list[str], Path | None], None]
"""(arguments of flwr-clientapp, where the bundle lies or belongs unpacked)"""


class ForkExecutor:
    """Starts each task in a fork of this process; the `Executor` of Flower's SuperExec."""

    def __init__(self, start: Start, bundles: BundleStore) -> None:
        """`start` runs in each fork."""
        self._start, self._bundles = start, bundles
        self._forks: dict[int, Path | None] = {}  # pid -> where its bundle is

    def get_eligible_capacity(self, supported_task_types: set[Any], **_: object) -> tuple[set[Any], set[str]]:
        return {kind for kind in supported_task_types if str(kind) == "flwr-clientapp"}, set()

    def wait_for_capacity(self, *_: object, **__: object) -> None:
        """A fork needs no place of its own."""

    def launch(self, spec: Any) -> Any:
        from flwr.supercore.superexec.executor import LaunchResult

        arguments = ["--runtime-api-address", spec.runtime_api_address, "--token", spec.token, "--insecure"]
        place = self._bundles.place(spec.fab_hash)
        # a signal that comes before the fork has its own handlers would run the parent's, or be lost
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._be_fork(arguments, place, before)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._forks[pid] = place
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Take leave of the forks that have ended."""
        for pid in list(self._forks):
            with contextlib.suppress(ChildProcessError):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended:
                    continue
                if status:
                    _logger.warning("a message's process ended with %d", os.waitstatus_to_exitcode(status))
            place = self._forks.pop(pid)
            if place is not None:
                self._bundles.settle(place)

    def close(self) -> None:
        for pid in self._forks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _be_fork(self, arguments: list[str], place: Path | None, mask: Iterable[int]) -> None:
        status = 1
        try:
            os.closerange(3, _LAST_DESCRIPTOR)
            for number in _SIGNALS:
                signal.signal(
                    number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                )
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            exits: Any = importlib.import_module("flwr.supercore.exit.exit_handler")
            exits.registered_exit_handlers.clear()  # they are the parent's: one of them ends all forks
            random.seed()
            numbers: Any = sys.modules.get("numpy.random")  # who loads it later starts from fresh entropy
            if numbers is not None:
                numbers.seed()
            self._start(arguments, place)
            status = 0
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:  # noqa: BLE001 - a fork must never return into the parent's loop
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(Exception):
                importlib.import_module("atexit")._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status & 0xFF)


def confined(options: list[str]) -> Start:
    """Return what runs a message's bundle under `clients.launcher`: only if approved, and confined."""
    launcher = importlib.import_module("clients.launcher")

    def start(arguments: list[str], place: Path | None) -> None:
        bundle = [] if place is None else ["--bundle", str(place)]
        launcher.main([*options, *bundle, "--", *arguments])

    return start


def serve(address: str, secret: bytes, bell: Bell, executor: ForkExecutor) -> None:
    """Take tasks from the SuperNode at `address` until a signal comes."""
    superexec: Any = importlib.import_module("flwr.supercore.superexec.run_superexec")
    superexec.get_executor = lambda *_, **__: executor
    superexec.time = with_sleep(superexec.time, lambda _: bell.wait(LOOK_S))
    superexec.run_superexec(runtime_api_address=address, insecure=True, superexec_auth_secret=secret)


def main() -> None:
    parser = argparse.ArgumentParser(prog="affidavit-relay")
    parser.add_argument("bell", type=Path)
    for name in ("--agent", "--site", "--scratch", "--runtime-api-address"):
        parser.add_argument(name, required=True)
    parser.add_argument("--secret-file", type=Path, required=True)
    given = parser.parse_args()
    Path(given.scratch).mkdir(parents=True, exist_ok=True, mode=0o700)
    kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    os.environ.clear()
    os.environ.update(kept, AFFIDAVIT_AGENT=given.agent)
    for name in PRELOAD:
        importlib.import_module(name)
    start = confined(["--agent", given.agent, "--site", given.site, "--scratch", given.scratch])
    executor = ForkExecutor(start, BundleStore(Path(given.scratch).resolve() / "bundles"))
    with Bell(given.bell) as bell:
        serve(given.runtime_api_address, given.secret_file.read_bytes(), bell, executor)


if __name__ == "__main__":
    main()
