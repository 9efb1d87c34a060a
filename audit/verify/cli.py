"""The command `affidavit verify`: argparse, plain text or JSON, and an exit code for scripts."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from audit.errors import MalformedPolicyError
from audit.evidence import MAX_BYTES
from audit.verify import verify_evidence
from audit.verify.misbehaviour import is_misbehaviour, verify_misbehaviour
from audit.verify.report import USAGE_EXIT, Report
from audit.verify.stories import compare_stories

_MAX_SIDE_BYTES: Final = 1 << 20
_DATABASE: Final = b"SQLite format 3\x00"
_EPILOG: Final = """\
exit codes: 0 VALID, 1 INVALID, 2 wrong usage, 3 SELF-CONSISTENT ONLY (no policy), 4 INCOMPLETE, 5 STALE,
6 UNWITNESSED.

The policy names the log's key, the witnesses and their quorum. Get it from somebody other than whoever gave
you the file: a policy that came with the file proves nothing."""


class UsageError(Exception):
    """What was asked for cannot be tried; the message names the file and the fix."""


def main(argv: Sequence[str]) -> int:
    """Verify one file, print the report, return the exit code."""
    parser = argparse.ArgumentParser(
        prog="affidavit verify",
        description="Check an evidence file offline: recompute everything that can be recomputed, and say "
        "what not.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help="the evidence file (.zip), a proof of misbehaviour (.json), or a whole log (log.db)",
    )
    parser.add_argument("--policy", metavar="FILE", help="the policy: whose keys count, how many witnesses")
    parser.add_argument("--receipt", metavar="FILE", help="the receipt you were given with the answer (JSON)")
    parser.add_argument(
        "--replay",
        action=argparse.BooleanOptionalAction,
        help="replay every round (default: when cheap; else INCOMPLETE)",
    )
    parser.add_argument("--max-age", metavar="SECONDS", type=_seconds, help="how old the checkpoint may be")
    parser.add_argument(
        "--site", metavar="FILE", help="a site's own log (`affidavit site log export`): compare the two"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    try:
        data = _read(arguments.file, MAX_BYTES + 1, "give the path of an exported .zip")
        policy = _text(arguments.policy) if arguments.policy else None
        receipt = (
            _read(arguments.receipt, _MAX_SIDE_BYTES, "give the JSON receipt") if arguments.receipt else None
        )
        if arguments.site:
            _read(arguments.site, 1, "give the path of a site's own log")
            report = compare_stories(arguments.file, arguments.site, policy_text=policy)
        elif data.startswith(_DATABASE):
            report = _whole_log(arguments.file, policy)
        elif is_misbehaviour(data):
            report = verify_misbehaviour(data, policy_text=policy)
        else:
            report = verify_evidence(
                data,
                policy_text=policy,
                receipt=receipt,
                replay=arguments.replay,
                max_age_s=arguments.max_age,
            )
    except MalformedPolicyError as error:
        print(f"error {error.code}: {arguments.policy}: {error}", file=sys.stderr)
        return USAGE_EXIT
    except UsageError as error:
        print(f"error verify.usage: {error}", file=sys.stderr)
        return USAGE_EXIT
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.stdout.write(report.json_text() if arguments.json else report.text())
    return report.exit_code


def _whole_log(path: str, policy: str | None) -> Report:
    """A log file instead of an evidence file: that needs the database library, found at run time."""
    try:
        whole_log = importlib.import_module("audit.whole_log")
    except ImportError as error:
        raise UsageError(f"{path}: is a log file; install affidavit[coordinator] to verify one") from error
    report: Report = whole_log.verify_log(path, policy_text=policy)
    return report


def _read(path: str, limit: int, fix: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(limit)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}; {fix}") from error


def _text(path: str) -> str:
    try:
        return _read(path, _MAX_SIDE_BYTES, "give the path of a policy file").decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text; give the path of a policy file") from error


def _seconds(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of seconds")
    return int(text)
