"""Every error `federation` raises on purpose: one base, stable codes, evidence as fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class FederationError(Exception):
    """Base of every error `federation` raises on purpose."""

    code = "federation.error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong in a document, for the person who wrote it."""

    path: str  # "privacy.epsilon", "features[3].upper"
    message: str
    fix: str
    line: int | None = None

    def text(self, source: str = "") -> str:
        """Return `file:line: path: message; fix`."""
        where = (
            f"{source}:{self.line}"
            if source and self.line
            else source or (f"line {self.line}" if self.line else "")
        )
        return ": ".join(part for part in (where, self.path, f"{self.message}; {self.fix}") if part)


class CharterError(FederationError):
    """The charter cannot be used; each problem names the line, the key and the fix."""

    code = "federation.charter"

    def __init__(self, problems: Sequence[Problem], *, source: str = "") -> None:
        super().__init__("\n".join(problem.text(source) for problem in problems))
        self.problems, self.source = tuple(problems), source


class CharterFileError(FederationError):
    """The charter's file cannot be read, or is not the strict YAML that charters use."""

    code = "federation.charter_file"

    def __init__(self, message: str, *, source: str, line: int | None) -> None:
        where = f"{source}:{line}" if source and line else source or (f"line {line}" if line else "charter")
        super().__init__(f"{where}: {message}")
        self.source, self.line = source, line


class LayerError(FederationError):
    """A layer list does not describe a model."""

    code = "federation.layer"

    def __init__(self, index: int | None, message: str, fix: str) -> None:
        where = "layers" if index is None else f"layer {index}"
        super().__init__(f"{where}: {message}; {fix}")
        self.index, self.message, self.fix = index, message, fix


class DescribeError(FederationError):
    """A torch model has parts that the declarative layer list cannot express."""

    code = "federation.describe"

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(
            "this model cannot be written as a layer list:\n" + "\n".join(f"  {p}" for p in problems)
        )
        self.problems = tuple(problems)


class AccountingError(FederationError):
    """The events or the terms cannot be accounted."""

    code = "federation.accounting"


class PlanDoesNotFitError(AccountingError):
    """The plan costs more than the charter's own epsilon: nothing it trains could ever be approved."""

    code = "federation.plan_does_not_fit"

    def __init__(self, *, planned: str, allowed: str, noise: str) -> None:
        super().__init__(
            f"the plan costs epsilon {planned}, the charter allows {allowed}; write noise_multiplier: {noise}"
        )
        self.planned, self.allowed, self.noise = planned, allowed, noise


class PublicSetError(FederationError):
    """The declared public set is absent, altered or does not fit the data contract."""

    code = "federation.public_set"


class BlobMissingError(FederationError):
    code = "federation.blob_missing"

    def __init__(self, digest: str) -> None:
        super().__init__(
            f"no file with digest {digest} is kept here; restore it from a backup or another home"
        )
        self.digest = digest


class BlobAlteredError(FederationError):
    code = "federation.blob_altered"

    def __init__(self, digest: str, found: str) -> None:
        super().__init__(f"the file kept as {digest} now has digest {found}; restore it from a backup")
        self.digest, self.found = digest, found


class HomeError(FederationError):
    """A coordinator's home is missing or incomplete."""

    code = "federation.home"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = path, problem


class StatementError(FederationError):
    """What a site sent for a round is not what the charter, the run and its own odometer demand."""

    code = "federation.statement"

    def __init__(self, site: str, field: str, message: str) -> None:
        super().__init__(f"site {site}: {field}: {message}")
        self.site, self.field = site, field


class ReplyError(FederationError):
    """A node answered outside the protocol."""

    code = "federation.reply"

    def __init__(self, site: str, message: str) -> None:
        super().__init__(f"site {site}: {message}")
        self.site = site


class SiteRefusedError(FederationError):
    """A site declined, with a code from the closed list."""

    code = "federation.site_refused"

    def __init__(self, site: str, reason: str) -> None:
        super().__init__(f"site {site} refused: {reason}; its own console names the cause")
        self.site, self.reason = site, reason


class RunFailedError(FederationError):
    """The run stopped; what was released stays debited and in the log."""

    code = "federation.run_failed"

    def __init__(self, run: str, round_number: int, reason: str, detail: str) -> None:
        super().__init__(f"run {run} failed in round {round_number}: {reason}: {detail}")
        self.run, self.round, self.reason, self.detail = run, round_number, reason, detail


class RunHeldError(FederationError):
    """Another process carries the run out."""

    code = "federation.run_held"

    def __init__(self, run: str, problem: str) -> None:
        super().__init__(f"run {run}: {problem}; watch it with `affidavit runs follow {run[:12]}`")
        self.run, self.problem = run, problem


class ResumeError(FederationError):
    """The run cannot go on from what log and files hold; nothing was written."""

    code = "federation.not_resumable"

    def __init__(self, run: str, problem: str, fix: str) -> None:
        super().__init__(f"run {run} cannot be resumed: {problem}; {fix}")
        self.run, self.problem, self.fix = run, problem, fix


class ResumeLaterError(ResumeError):
    """The run can go on, but not with the sites that are there now; nothing was written."""

    code = "federation.resume_later"


class MaskedRunError(FederationError):
    """A run's updates are masked: there is nothing to show of one site's."""

    code = "federation.masked_run"

    def __init__(self, run: str) -> None:
        super().__init__(
            f"the updates of run {run} are masked, so only their sum can be read; "
            "a charter without secure_aggregation shows how they stand beside each other"
        )
        self.run = run


class NotFoundError(FederationError):
    code = "federation.not_found"

    def __init__(self, what: str, name: str) -> None:
        super().__init__(f"no {what} {name!r} in this log")
        self.what, self.name = what, name


class TransitionError(FederationError):
    """A version may not move to that state."""

    code = "federation.transition"


class GateNotPassedError(TransitionError):
    code = "federation.gate_not_passed"

    def __init__(self, version: str, failed: Sequence[str]) -> None:
        super().__init__(f"version {version[:12]} did not pass: {', '.join(failed)}; it cannot be approved")
        self.version, self.failed = version, tuple(failed)


class OfficerError(TransitionError):
    """The key is not one of the charter's officers, or belongs to the version's own author."""

    code = "federation.officer"


class ExportError(FederationError):
    """A version has no ONNX form, or a file is not the one that its weights make."""

    code = "federation.export"


class LayerNotExportedError(ExportError):
    """A layer has no float64 form in ONNX Runtime; torch serves such a model."""

    code = "federation.layer_not_exported"


class NotAllowedError(FederationError):
    code = "federation.not_allowed"

    def __init__(self, principal: str, action: str) -> None:
        super().__init__(f"{principal} may not {action}")
        self.principal, self.action = principal, action
