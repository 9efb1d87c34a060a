"""Attributions of an answer to its features, for who asks with `"explain": true`.

A linear model's are its own terms. Any other model's are captum's integrated gradients over the torch
version, loaded by digest and in float64; that needs the `[explain]` extra. They are computed beside the event
loop, one request after the other, under a deadline. What comes of it is committed to and sealed with the
row's answer (`audit.explanations` says what a verifier can check), so it can be opened and erased like it.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from audit.answers import AnswerTerms
from audit.errors import AuditError
from audit.explanations import (
    GAP_LIMIT,
    GRADIENTS,
    LINEAR,
    attribution_document,
    by_feature,
    explained_output,
    is_linear,
    linear_attributions,
)
from audit.forward import forward
from audit.models import weights_of_file
from federation.errors import FederationError
from server.errors import ArtefactError, MalformedRequestError, ServerError, TooBusyError
from server.hooks import NOTHING, Annotation, Answering
from server.live import ServedVersion
from server.monitoring import Monitoring

MAX_ROWS: Final = 16
_WAITING: Final = 8  # requests that may wait; more are told to come back
_KEPT: Final = 4
_STEPS: Final = (64, 512)  # of the integral; more where the sum misses too much

Layers = Sequence[dict[str, Any]]


class ExplainUnavailableError(ServerError):
    """This server cannot explain: captum is not installed, or the model has no gradients by its inputs."""

    code = "explain.not_available"


class ExplainRefusedError(ServerError):
    """The charter lets out less than attributions would tell."""

    code = "explain.not_allowed"


class Explaining:
    """Annotates the answers of those who ask."""

    def __init__(self, get_blob: Callable[[str], bytes], monitoring: Monitoring, *, timeout_s: float) -> None:
        self._get, self._monitoring, self._timeout_s = get_blob, monitoring, timeout_s
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="explain")
        self._weights: OrderedDict[str, list[float]] = OrderedDict()
        self._lock = threading.Lock()
        self._waiting = 0

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def annotate(self, answering: Answering) -> Annotation | Awaitable[Annotation]:
        """Explain every row, or nothing where the request did not ask; errors as `explain`."""
        return self.explain(answering) if answering.asked.explain else NOTHING

    async def explain(self, answering: Answering) -> Annotation:
        """Explain every row.

        Raises:
            MalformedRequestError: too many rows to explain at once.
            ExplainRefusedError: the charter rounds answers, or gives labels alone.
            ExplainUnavailableError: see there.
            TooBusyError: it took longer than allowed, or too many are waiting.
        """
        if len(answering.encoded) > MAX_ROWS:
            problem = f"{len(answering.encoded)} rows; at most {MAX_ROWS} can be explained in one request"
            raise MalformedRequestError(
                f"explain: {problem}", fields=[{"field": "explain", "problem": problem}]
            )
        kept_back = _kept_back(AnswerTerms.of_charter(answering.served.charter))
        if kept_back:
            raise ExplainRefusedError(kept_back)
        if self._waiting >= _WAITING:
            raise TooBusyError("too many explanations are waiting; come back later")
        self._waiting += 1
        loop = asyncio.get_running_loop()
        try:
            with self._monitoring.explain_seconds.time():
                found = await asyncio.wait_for(
                    loop.run_in_executor(self._pool, self._explain, answering), self._timeout_s
                )
        except TimeoutError as error:
            raise TooBusyError(f"no explanation within {self._timeout_s:g} s") from error
        finally:
            self._waiting -= 1
        return Annotation(shown={"attributions": found}, rows=[{"attributions": one} for one in found])

    def _explain(self, answering: Answering) -> list[dict[str, Any]]:
        served, asked = answering.served, answering.asked
        charter = served.charter
        layers, names = charter["model"]["layers"], [site["name"] for site in charter["sites"]]
        site = names.index(asked.site) if asked.site else None
        weights = self._weights_of(served)
        method = LINEAR if is_linear(layers) else GRADIENTS
        gradients = _Gradients(layers, weights, site) if method == GRADIENTS else None
        found = []
        for encoded, answer in zip(answering.encoded, answering.answers, strict=True):
            output = explained_output(charter["task"], charter["label"], answer)
            base = forward(layers, weights, [0.0] * len(encoded), site)[output]
            total = forward(layers, weights, encoded, site)[output]
            if gradients is None:
                values = linear_attributions(layers, weights, encoded, output)
            else:
                values = gradients.attributions(encoded, output, total - base)
            found.append(
                attribution_document(
                    method=method,
                    output=output,
                    base=base,
                    total=total,
                    values=by_feature(charter["features"], values),
                )
            )
        return found

    def _weights_of(self, served: ServedVersion) -> list[float]:
        with self._lock:
            weights = self._weights.get(served.version)
        if weights is None:
            try:
                weights = weights_of_file(served.charter["model"]["layers"], self._get(served.version))
            except (AuditError, FederationError, OSError) as error:
                raise ArtefactError(f"version {served.version}: {error}") from error
            with self._lock:
                self._weights[served.version] = weights
                while len(self._weights) > _KEPT:
                    self._weights.popitem(last=False)
        return weights


def _kept_back(terms: AnswerTerms) -> str:
    """Return why a charter's answers may not be explained, or "".

    Rounding attributions alike would not do: over many rows of a linear model they still give the weights,
    and rows whose answers read equal would differ in theirs.
    """
    if terms.label_only:
        return "the model's charter lets out labels alone, and attributions would tell the score"
    if terms.is_restricted:
        return (
            f"the model's charter lets out answers of {terms.decimals} decimals (answers.decimals), and "
            "attributions would tell the rest; ask without explain"
        )
    return ""


class _Gradients:
    """captum over one version."""

    def __init__(self, layers: Layers, weights: Sequence[float], site: int | None) -> None:
        if any(layer["layer"] == "embedding" for layer in layers):
            raise ExplainUnavailableError("a model that looks its inputs up has no gradients by them")
        try:
            from captum.attr import IntegratedGradients  # type: ignore[import-untyped]  # ships no types
        except ImportError as error:
            raise ExplainUnavailableError(
                "this server explains linear models only; install affidavit[explain] for this one"
            ) from error
        from federation.torch_models import build_model, set_weights

        model = build_model(layers, precision="float64")
        set_weights(model, weights)
        model.eval()
        self._method = IntegratedGradients(lambda rows: model(rows, site))

    def attributions(self, encoded: Sequence[float], output: int, difference: float) -> list[float]:
        """Return one attribution for each encoded input.

        Raises:
            ExplainUnavailableError: their sum does not come near `difference`, however fine the steps.
        """
        import torch

        row = torch.tensor([list(encoded)], dtype=torch.float64)
        limit = float(GAP_LIMIT) * (1.0 + abs(difference))
        for steps in _STEPS:
            found = self._method.attribute(row, torch.zeros_like(row), target=output, n_steps=steps)
            values: list[float] = found[0].tolist()
            if abs(sum(values) - difference) <= limit / 10:
                return values
        if abs(sum(values) - difference) <= limit:
            return values
        raise ExplainUnavailableError("integrated gradients do not settle on this model; ask without explain")
