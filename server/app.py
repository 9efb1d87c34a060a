"""`create_app(settings)`: the parts put together, the routes mounted, the log opened at start and closed at
the end.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from anyio import to_thread
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import Message, Receive, Scope, Send

from audit.subjects import ORPHAN_AGE_S, reconcile
from audit.vault_home import open_vault
from federation.coordinator import Coordinator
from federation.registry import LIVE
from server import (
    errors,
    openapi,
    reference,
    routes_audit,
    routes_keys,
    routes_models,
    routes_officer,
    routes_policy,
    routes_receipts,
    routes_reviews,
    routes_runs,
    routes_subjects,
    routes_tiles,
)
from server.access import CedarAuthorizer, authorizer_of, shipped_policies
from server.alarming import Alarming
from server.answer_cache import AnswerCache
from server.batching import Batching
from server.context import Caller, Context, authorise, context_of
from server.denials import Denials
from server.direct import Direct
from server.errors import ArtefactError, NotReadyError
from server.explaining import Explaining
from server.facts import DecisionFacts
from server.guard import Guard
from server.hooks import Hooks
from server.identity import Identities
from server.journal import Clock, Journal, time_text, utc_now
from server.keys import KeyStore
from server.live import LiveModels
from server.monitoring import CONTENT_TYPE, Monitoring
from server.oidc import token_verifier
from server.oip import routes as routes_oip
from server.proxy_identity import proxy_identity
from server.publishing import Publisher
from server.quotas import Limit, Quotas
from server.readiness import Readiness
from server.reading_log import ReadingLog
from server.receipting import Receipting
from server.rules import RulesInForce
from server.rules_follower import RulesFollower
from server.schemas import problems
from server.scoring import Scoring
from server.sealing import Sealing
from server.service import PredictService
from server.settings import Settings
from server.shadowing import Shadowing
from server.shedding import Shedder
from server.tracing import Traced, Tracing
from server.warm import WarmModels
from server.watching import Watching

_logger = logging.getLogger(__name__)

_ABOUT: Final = """\
Models trained by several sites under differential privacy, whose every claim can be proved.

**In five minutes.** Get a key from your operator (`affidavit keys create --role consumer`) and send it as
`Authorization: Bearer …`. `GET /v1/models` lists the models; `GET /v1/models/{name}` shows what a row must
hold and which purposes are allowed; `POST /v1/models/{name}/predict` answers. Each answer carries
the policies that allowed it, a receipt signed by the log, and the salts that open its entry.
`GET /v1/audit/evidence/{index}` gives a zip that `affidavit verify` checks offline, against a policy
file that you got elsewhere.

**Errors** are RFC 9457 problem documents. Decide by `code`; it is stable. A refusal by policy names the
policies and the entry that records it. `503` means that the log could not record the request: there is no
answer without an entry.
"""


class _Application(FastAPI):
    """FastAPI, entered at its outermost middleware that is ours: the guard lets no error out.

    Why it did not start stays in `state.start_error`, for who started it, in place of a traceback in the log.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, _without_traceback(send))
            return
        stack = self.middleware_stack
        if scope["type"] == "http" and not self.root_path and isinstance(stack, ServerErrorMiddleware):
            scope["app"] = self
            await stack.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _without_traceback(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            message = {**message, "message": ""}
        await send(message)

    return sending


def create_app(settings: Settings, *, clock: Clock = utc_now) -> FastAPI:
    """Build the application. Policies are loaded and checked here, so a bad file stops the start.

    Raises:
        PolicyLoadError: the access policies do not hold together.
        SettingsError: traces are asked for, and OpenTelemetry is not installed, or their address is none.
    """
    own = settings.policies
    authorizer = authorizer_of(own) if own else CedarAuthorizer(shipped_policies())
    monitoring = Monitoring()
    shedder = Shedder(most=settings.max_in_flight, target_s=settings.shed_latency_s)
    tracing = Tracing(settings.otlp_endpoint, settings.trace_share) if settings.otlp_endpoint else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            async with serving(app):
                yield
        except Exception as error:
            app.state.start_error = error
            raise

    @asynccontextmanager
    async def serving(app: FastAPI) -> AsyncIterator[None]:
        context = build_context(settings, authorizer, monitoring, clock)
        app.state.context, grpc_server = context, None
        try:
            await context.rules_follower.start()
            await record_policies(context)
            await to_thread.run_sync(reconcile_vault, context)
            await to_thread.run_sync(warm_up, context)
            await context.publisher.start()
            context.watching.start()
            if settings.grpc_port is not None:
                from server.oip.grpc_service import InferenceServer

                grpc_server = InferenceServer(context, app.version, shedder)
                app.state.grpc_port = await grpc_server.start(settings.address(settings.grpc_port))
                _logger.info("gRPC on port %d", app.state.grpc_port)
            context.readiness.state = "ready"
            yield
        finally:
            context.readiness.state = "draining"
            if grpc_server is not None:
                await grpc_server.stop(settings.request_timeout_s)
            if context.predicting.shadowing is not None:
                await context.predicting.shadowing.drain()
            await context.alarming.settle()
            context.explaining.close()
            if tracing is not None:
                await to_thread.run_sync(tracing.close)
            await context.watching.stop()
            await context.rules_follower.stop()
            await context.publisher.stop()
            monitoring.tallies.flush()
            context.keys.close()
            await to_thread.run_sync(context.quotas.close)
            context.vault.close()
            context.coordinator.close()

    app = _Application(
        title="Affidavit",
        summary="Federated learning whose every claim can be proved",
        description=_ABOUT,
        version=_version(),
        lifespan=lifespan,
        openapi_tags=[
            {"name": "models", "description": "What is registered, and answers from what is live."},
            {
                "name": "inference protocol",
                "description": "The same answers by the Open Inference Protocol v2.",
            },
            {"name": "audit", "description": "The log: entries, proofs, checkpoints, evidence."},
            {"name": "subjects", "description": "A person: everything about them, or nothing any more."},
            {"name": "reviews", "description": "Decisions that a person must review, and alarms."},
            {"name": "policy", "description": "The rules that decide, and their changes."},
            {"name": "keys", "description": "API keys, for operators."},
            {"name": "service", "description": "Health and metrics."},
        ],
        redirect_slashes=False,
        docs_url=None,  # they would send the browser to another host: server.reference
        redoc_url=None,
    )
    errors.install(app)
    officer = (
        routes_officer.router,
        routes_tiles.router,
        routes_subjects.router,
        routes_runs.router,
        routes_reviews.router,
        routes_policy.router,
    )
    served = (
        routes_models.router,
        routes_oip.router,
        routes_audit.router,
        routes_receipts.router,
        *officer,
        routes_keys.router,
    )
    for router in served:
        # The routes themselves, as they stand: `include_router` would analyse each signature again, once an
        # application, and lay a second lookup over every request.
        app.router.routes.extend(router.routes)
    _service_routes(app)
    openapi.install(app)
    reference.install(app)
    app.add_middleware(Direct, routes=app.router.routes, state=app.state)
    if tracing is not None:
        app.add_middleware(Traced, tracing=tracing)
    app.add_middleware(Guard, settings=settings, monitoring=monitoring, shedder=shedder)
    return app


def build_context(
    settings: Settings, authorizer: CedarAuthorizer, monitoring: Monitoring, clock: Clock
) -> Context:
    """Open the log and make every part.

    Raises:
        LedgerMissingError, SignerMissingError: a home is not there; `affidavit init` makes them.
    """
    coordinator = Coordinator.open(settings.coordinator_home, settings.signer_home)
    journal = Journal(coordinator.ledger, clock, monitoring, timeout_s=settings.request_timeout_s / 2)
    live = LiveModels(coordinator.ledger)
    vault = open_vault(settings.coordinator_home, coordinator.ledger.origin)
    sealing = Sealing(vault, journal, settings.request_timeout_s / 2)
    receipting = Receipting(coordinator.signer, clock, merge_delay_s=settings.merge_delay_s)
    keys = KeyStore(
        settings.coordinator_home, clock, cache_s=settings.key_cache_s, recheck_s=settings.key_recheck_s
    )
    rules = RulesInForce(coordinator.ledger, authorizer, keys.revoked_in_log)
    limits = (Limit(60, settings.quota_rows_per_minute), Limit(86_400, settings.quota_rows_per_day))
    quotas = Quotas(settings.coordinator_home, clock, tuple(limit for limit in limits if limit.rows))
    facts = DecisionFacts(rules=rules, clock=clock, follow_s=settings.rules_follow_s)
    warm = WarmModels(coordinator.blobs, live.in_use)
    scoring = Scoring(coordinator.ledger, coordinator.blobs.get, monitoring)
    explaining = Explaining(coordinator.blobs.get, monitoring, timeout_s=settings.explain_timeout_s)
    alarming = Alarming(journal, monitoring)
    cache = AnswerCache(
        settings.answer_cache_size,
        settings.answer_cache_s,
        lambda result: monitoring.cached.labels(result).inc(),
    )
    publisher = Publisher(
        coordinator, monitoring, clock, interval_s=settings.publish_interval_s, late_s=settings.late_s
    )
    return Context(
        settings=settings,
        alarming=alarming,
        explaining=explaining,
        coordinator=coordinator,
        keys=keys,
        identities=Identities(
            keys=keys,
            tokens=token_verifier(settings, keys.pseudonym, clock),
            certificates=proxy_identity(settings, clock, monitoring.spoofed_identities.inc),
        ),
        rules=rules,
        rules_follower=RulesFollower(
            rules, coordinator.ledger, journal, authorizer, interval_s=settings.rules_follow_s
        ),
        quotas=quotas,
        first_policies=authorizer.text,
        authorizer=authorizer,
        journal=journal,
        denials=Denials(journal, monitoring, clock),
        live=live,
        predicting=PredictService(
            live=live,
            warm=warm,
            authorizer=authorizer,
            journal=journal,
            receipting=receipting,
            monitoring=monitoring,
            sealing=sealing,
            hooks=Hooks(
                facts=(publisher.backlog, facts),
                annotators=(scoring, explaining),
                observers=(alarming,),
            ),
            batching=Batching(cache),
            quotas=quotas,
            shadowing=Shadowing(warm, journal, sealing, monitoring),
        ),
        publisher=publisher,
        watching=Watching(coordinator, clock),
        monitoring=monitoring,
        clock=clock,
        reading=ReadingLog(sealing, journal),
        vault=vault,
        readiness=Readiness(live, warm, publisher.backlog.problem, journal.recording.problem),
    )


async def record_policies(context: Context) -> None:
    """Say in the log which rules decide from now on, unless the last such entry says so already."""
    from audit.entries import PolicyApplied, decode_entry

    applied = context.authorizer.applied()
    last = context.coordinator.ledger.search(type="policy.applied", newest_first=True, limit=1)
    body = decode_entry(last[0].body).body if last else None
    if not isinstance(body, PolicyApplied) or body != applied:
        await context.journal.append(applied)


def reconcile_vault(context: Context) -> None:
    """Finish erasures that a crash cut off, and apply the log's to a vault that came from a backup."""
    before = time_text(context.clock() - timedelta(seconds=ORPHAN_AGE_S))
    done = reconcile(context.coordinator.ledger, context.vault, before=before)
    if done.finished or done.forgotten or done.swept:
        _logger.warning("vault: finished=%d forgotten=%d swept=%d", done.finished, done.forgotten, done.swept)


def warm_up(context: Context) -> None:
    """Read the log and load what is live, so that the first caller waits for neither."""
    for name in context.live.models():
        served = context.live.answering(name)
        if served.state == LIVE:
            try:
                context.predicting.warm.get(served)
            except ArtefactError as error:
                _logger.error("model %s cannot answer: %s", name, error)


def _service_routes(app: FastAPI) -> None:
    @app.get("/healthz", tags=["service"], summary="Is the process alive?")
    async def healthz(request: Request) -> dict[str, Any]:
        """200 while the process can answer at all, without the database too: a restart mends no outage."""
        return {"status": "ok", "state": context_of(request).readiness.state}

    @app.get(
        "/readyz", tags=["service"], summary="Should the service be sent requests?", responses=problems(503)
    )
    async def readyz(request: Request) -> dict[str, Any]:
        """200 once the log can be read and every live model is loaded, until the process drains."""
        problem = await to_thread.run_sync(context_of(request).readiness.problem)
        if problem:
            raise NotReadyError(problem)
        return {"status": "ready"}

    @app.get(
        "/metrics",
        tags=["service"],
        summary="Read Prometheus metrics",
        response_class=Response,
        responses={**problems(401, 403), 200: {"content": {"text/plain": {}}}},
    )
    async def metrics(request: Request, principal: Caller) -> Response:
        """Text exposition format 0.0.4; an operator's key is needed."""
        await authorise(request, principal, "metrics.read")
        context = context_of(request)
        coordinator, monitoring = context.coordinator, context.monitoring
        await to_thread.run_sync(monitoring.look_at_network, coordinator.home, coordinator.ledger)
        return Response(monitoring.render(), media_type=CONTENT_TYPE)


@cache
def _version() -> str:
    try:
        return version("affidavit")
    except PackageNotFoundError:
        return "0"
