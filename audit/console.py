"""What every command shares: where homes are, how results and errors are printed, and the exit codes.

    0  done
    1  refused or failed; one line on standard error names the code and the fix
    2  the command line is wrong
    3-6  `verify` only, see `affidavit verify --help`

With `--json` standard output holds exactly one JSON document: the result, or {"error": {"code", "message"}}.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, ParamSpec, TypeVar

import typer

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_BASE: Final = ".affidavit"
DEBUG: Final = "AFFIDAVIT_DEBUG"
_MAX_ERROR_LINES: Final = 20


class CommandError(Exception):
    """A command cannot do what was asked; `code` is stable."""

    code = "command.error"

    def __init__(self, message: str, *, code: str = "command.error") -> None:
        super().__init__(message)
        self.code = code


def base_home(home: Path | None) -> Path:
    """Return the folder that holds the homes: --home, else AFFIDAVIT_HOME, else `.affidavit`."""
    return home or Path(os.environ.get("AFFIDAVIT_HOME") or DEFAULT_BASE)


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn every error of a command into one line with its code; no traceback unless AFFIDAVIT_DEBUG is
    set.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            fail("command.interrupted", "stopped; what was written stays", as_json=False)
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(1) from None
        except Exception as error:
            if os.environ.get(DEBUG):
                raise
            code, message = describe(error)
            fail(code, _shortened(message), as_json=bool(kwargs.get("as_json")))

    return run


def describe(error: Exception) -> tuple[str, str]:
    """Return the stable code and the message of any error."""
    code = getattr(error, "code", None)
    if isinstance(code, str):
        return code, "; ".join([str(error), *getattr(error, "__notes__", [])])
    if isinstance(error, FileNotFoundError):
        return "command.file_missing", f"{error.filename}: no such file"
    if isinstance(error, PermissionError):
        return "command.file_denied", f"{error.filename}: permission denied"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return "command.extra_missing", f"{error.name} is not installed; install affidavit[all]"
    if isinstance(error, OSError):
        return "command.os", str(error)
    return "command.internal", f"{type(error).__name__}: {error} (set {DEBUG}=1 for the traceback)"


def _shortened(message: str) -> str:
    lines = message.splitlines()
    more = len(lines) - _MAX_ERROR_LINES
    return message if more <= 0 else "\n".join([*lines[:_MAX_ERROR_LINES], f"and {more} more"])


def fail(code: str, message: str, *, as_json: bool, status: int = 1) -> NoReturn:
    """Print the error and leave."""
    if as_json:
        typer.echo(json.dumps({"error": {"code": code, "message": message}}))
    typer.echo(f"error {code}: {message}", err=True)
    raise typer.Exit(status)


def emit(document: Any, lines: Sequence[str] | str, *, as_json: bool) -> None:
    """Print the result: the document with --json, the lines for people otherwise."""
    if as_json:
        typer.echo(json.dumps(document, ensure_ascii=False, default=str))
    else:
        typer.echo(lines if isinstance(lines, str) else "\n".join(lines))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table as text, as wide as the terminal allows; rich is loaded only here."""
    import io

    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*[str(cell) for cell in row])
    width = Console(file=sys.stdout).width if sys.stdout.isatty() else 160
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(shown)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def show_argument_help(command: Any) -> None:
    """Give every argument its help text back, which Click 8.5 drops of what Typer 0.20 hands it."""
    import inspect

    for inner in getattr(command, "commands", {}).values():
        show_argument_help(inner)
    if command.callback is None:
        return
    signature = inspect.signature(inspect.unwrap(command.callback), eval_str=True)
    for param in command.params:
        if getattr(param, "help", "") is None and param.name in signature.parameters:
            found = getattr(signature.parameters[param.name].annotation, "__metadata__", ())
            param.help = next((info.help for info in found if getattr(info, "help", None)), None)


def call_api(
    url: str, path: str, *, key: str, method: str = "GET", body: Mapping[str, Any] | None = None
) -> tuple[int, bytes, str]:
    """Ask a running server with the standard library alone.

    Returns:
        Status, body, content type: also for refusals.

    Raises:
        CommandError: the URL is not http(s), or nobody answers.
    """
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    if not url.startswith(("http://", "https://")):
        raise CommandError(f"--url {url!r} must begin with http:// or https://", code="command.usage")
    request = Request(url.rstrip("/") + path, method=method)  # noqa: S310 - the scheme is checked above
    request.add_header("Accept", "application/json")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    try:
        with urlopen(request, timeout=60) as answer:  # noqa: S310 - the scheme is checked above
            return int(answer.status), answer.read(), str(answer.headers.get("Content-Type", ""))
    except HTTPError as error:
        return int(error.code), error.read(), str(error.headers.get("Content-Type", ""))
    except (URLError, TimeoutError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise CommandError(f"{url}: nobody answers ({reason})", code="command.unreachable") from error


def ask_api(
    url: str, path: str, *, key: str, method: str = "GET", body: Mapping[str, Any] | None = None
) -> bytes:
    """Like `call_api`, with refusals as errors that bear the server's own code.

    Raises:
        CommandError: the server refused; the code and the message are its own.
    """
    status, data, _ = call_api(url, path, key=key, method=method, body=body)
    if status < 400:
        return data
    try:
        problem = json.loads(data)
        raise CommandError(str(problem["detail"]), code=str(problem["code"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{url} answered {status}", code="command.unreachable") from error


def read_key(key: str | None, key_file: Path | None) -> str:
    """Return the API key: from a file, else from AFFIDAVIT_API_KEY; never from the command line's history."""
    if key_file is not None:
        return key_file.read_text(encoding="utf-8").strip()
    return key or os.environ.get("AFFIDAVIT_API_KEY", "")
