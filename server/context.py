"""What the routes share: built once at start, closed at the end; and the two questions every route asks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, ValidationError

from audit.canonical import parse_strict
from audit.errors import AuditError
from audit.principal import AccessDeniedError, Decision, Principal, Question, require
from audit.vault import Vault
from federation.coordinator import Coordinator
from server.access import CedarAuthorizer, PolicyText
from server.alarming import Alarming
from server.denials import Denials
from server.errors import MalformedRequestError, request_id_of
from server.explaining import Explaining
from server.identity import Identities
from server.journal import Clock, Journal
from server.keys import KeyStore
from server.live import LiveModels
from server.marks import note_principal
from server.monitoring import Monitoring
from server.publishing import Publisher
from server.quotas import Quotas
from server.readiness import Readiness
from server.reading_log import ReadingLog
from server.rules import RulesInForce
from server.rules_follower import RulesFollower
from server.service import PredictService
from server.settings import Settings
from server.watching import Watching

bearer = HTTPBearer(
    auto_error=False,
    scheme_name="API key",
    description="`Authorization: Bearer affidavit_…`, made by `affidavit keys create --role ROLE`; or, where "
    "the operator named an issuer, a token of that issuer.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The parts of one running server."""

    settings: Settings
    coordinator: Coordinator
    keys: KeyStore
    authorizer: CedarAuthorizer
    journal: Journal
    denials: Denials
    live: LiveModels
    predicting: PredictService
    publisher: Publisher
    watching: Watching
    monitoring: Monitoring
    clock: Clock
    reading: ReadingLog
    vault: Vault
    identities: Identities
    rules: RulesInForce
    rules_follower: RulesFollower
    quotas: Quotas
    first_policies: PolicyText  # that decide until an officer changes the rules
    alarming: Alarming
    explaining: Explaining
    readiness: Readiness


Parsed = TypeVar("Parsed", bound=BaseModel)


def context_of(request: Request) -> Context:
    """Return the application's context."""
    context = request.app.state.context
    assert isinstance(context, Context)  # noqa: S101 - set by create_app's lifespan
    return context


async def principal_of(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)] = None,
) -> Principal:
    """Return who asks; errors as `Identities.principal`."""
    return await identified(
        context_of(request), request, None if credentials is None else credentials.credentials
    )


async def identified(context: Context, request: Request, credentials: str | None) -> Principal:
    """Return who asks by what stands behind `Bearer`, and note it for the request's log line."""
    principal = await context.identities.principal(request, credentials)
    note_principal(request.scope, principal.id)
    return principal


Caller = Annotated[Principal, Depends(principal_of)]


@asynccontextmanager
async def denials_recorded(request: Request) -> AsyncIterator[None]:
    """Make a refusal inside the block an entry before it becomes an answer, as `Denials.record` does.

    Raises:
        AccessDeniedError: refused, with the entry's place in `entry` where there is one.
        LedgerUnavailableError: refused, and the log could not record it.
    """
    context = context_of(request)
    try:
        yield
    except AccessDeniedError as denied:
        await context.denials.record(denied, request_id_of(request))
        raise


async def authorise(request: Request, principal: Principal, action: str) -> Decision:
    """Ask the policies about the service as a whole; errors as `denials_recorded`."""
    question = Question(action=action, resource="service")
    async with denials_recorded(request):
        return require(context_of(request).authorizer, principal, question)


async def parsed_body(request: Request, kind: type[Parsed]) -> Parsed:
    """Read a JSON body strictly.

    Raises:
        MalformedRequestError: names each field and what is wrong with it.
    """
    try:
        return kind.model_validate(parse_strict(await request.body()))
    except AuditError as error:
        raise MalformedRequestError(f"the body is not strict JSON: {error}") from error
    except ValidationError as error:
        fields = [
            {"field": ".".join(map(str, found["loc"])), "problem": found["msg"]}
            for found in error.errors(include_url=False, include_input=False)[:50]
        ]
        raise MalformedRequestError(f"{fields[0]['field']}: {fields[0]['problem']}", fields=fields) from error


async def require_whole_log(request: Request, principal: Principal) -> Decision:
    """Ask whether the caller may read every entry; errors as `denials_recorded`."""
    question = Question(action="log.read", resource="log")
    async with denials_recorded(request):
        return require(context_of(request).authorizer, principal, question)
