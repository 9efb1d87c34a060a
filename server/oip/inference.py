"""From a protocol's request to the use case and back, for REST and gRPC alike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from audit.principal import Principal
from audit.serving_bodies import LEGAL_BASES
from server.answers import Answered, Asked
from server.context import Context
from server.deadlines import OwnLimit
from server.errors import MalformedRequestError
from server.fast_json import write_json
from server.live import ServedVersion
from server.oip.tensors import InferAsk, Signature, Tensor, TensorError, answer_tensors
from server.proving import proved
from server.schemas import NAME_PATTERN, PURPOSE_PATTERN, VERSION_PATTERN
from server.watching import Level

PURPOSE: Final = "affidavit-purpose"  # header or metadata, for clients that send no parameters
PLATFORM: Final = "affidavit_onnx_float64"
EXTENSIONS: Final = ("binary_tensor_data",)
Told = TypeVar("Told")
_is_purpose = re.compile(PURPOSE_PATTERN).fullmatch
_is_site = re.compile(r"[a-z0-9][a-z0-9-]{0,62}").fullmatch
_is_version = re.compile(VERSION_PATTERN).fullmatch
_is_name = re.compile(NAME_PATTERN).fullmatch
_KEPT: Final = 256
_signatures: dict[str, Signature] = {}
_COMMON: Final = frozenset({"purpose", "binary_data_output"})  # what most requests say, and no more
_NO_EFFECT: Final = {
    "priority": (int,),
    "sequence_id": (int, str),
    "sequence_start": (bool,),
    "sequence_end": (bool,),
}
_TAKEN: Final = frozenset(
    {
        "purpose",
        "site",
        "subject",
        "legal_basis",
        "consent",
        "explain",
        "wait",
        "timeout",
        "binary_data_output",
        *_NO_EFFECT,
    }
)


class Inferred(NamedTuple):
    """What goes back: the head of the answer, and its tensors."""

    ask: InferAsk
    model: str
    version: str
    parameters: dict[str, str | int]
    outputs: tuple[Tensor, ...]


class Inference:
    """One request of the protocol: what it asks, and what is told of the answer."""

    __slots__ = (
        "_ask",
        "_context",
        "_model",
        "_purpose",
        "_read",
        "_request_id",
        "_served",
        "_version",
        "level",
        "limit",
    )

    def __init__(
        self,
        context: Context,
        model: str,
        version: str,
        read: Callable[[], InferAsk],
        *,
        purpose: str,
        request_id: str,
    ) -> None:
        self._context, self._model, self._version, self._read = context, model, version, read
        self._purpose, self._request_id = purpose, request_id
        self.level: Level = "sequenced"
        self.limit = OwnLimit()

    def read(self) -> Asked:
        """Return what the use case is asked; MalformedRequestError: it is no request to this model."""
        ask = self._ask = self._read()
        self._check_names(ask)
        served = self._served = served_version(self._context, self._model, self._version)
        signature = _signature(served)
        _check_outputs(ask, signature)
        rows = signature.rows(ask.inputs, max_rows=self._context.settings.max_rows)
        text = _text(ask.parameters, "purpose") or self._purpose
        if not text or not _is_purpose(text):
            raise MalformedRequestError(
                f"purpose: say what the answer is for, as the parameter `purpose` or the header {PURPOSE}",
                fields=[{"field": "parameters.purpose", "problem": "is missing or malformed"}],
            )
        words = _words(ask.parameters)
        self.level = _level(ask.parameters)
        timeout_s = _timeout_s(ask.parameters)
        if timeout_s:
            self.limit.set(min(timeout_s, self._context.settings.request_timeout_s))
        return Asked(
            model=self._model,
            purpose=text,
            rows=rows,
            version=self._version or None,
            request_id=self._request_id,
            **words,
        )

    def _check_names(self, ask: InferAsk) -> None:
        for field, said, named in (
            ("model_name", ask.model, self._model),
            ("model_version", ask.version, self._version),
        ):
            if said and said != named:
                problem = "is another than the path's; leave it out, and name in the path what shall answer"
                raise MalformedRequestError(
                    f"{field}: {problem}", fields=[{"field": field, "problem": problem}]
                )

    def told(self, tell: Callable[[Inferred], Told], answered: Answered) -> Told | Answered:
        """Return what `tell` makes of an answer; the answer itself where a proof is to come with it."""
        return tell(self.tell(answered)) if self.level == "sequenced" else answered

    def tell(self, answered: Answered) -> Inferred:
        """Return what goes back of an answer."""
        served, ask = self._served, self._ask
        if answered.version != served.version:  # a transition came meanwhile, perhaps under another charter
            served = self._context.live.choose(self._model, answered.version)
        outputs = answer_tensors(_signature(served), answered.answers)
        if ask.outputs:
            outputs = tuple(tensor for tensor in outputs if tensor.name in ask.outputs)
        return Inferred(
            ask=ask,
            model=answered.model,
            version=answered.version,
            parameters=_parameters(answered),
            outputs=outputs,
        )


async def infer(
    context: Context, principal: Principal, inference: Inference, tell: Callable[[Inferred], Told]
) -> Told:
    """Answer an inference request; errors as `PredictService.answer`, and MalformedRequestError."""
    predicting, tells = context.predicting, partial(inference.told, tell)
    with inference.limit:
        told = await predicting.answer(principal, inference.read, tells)
        if isinstance(told, Answered):  # with a proof, which is not there yet
            told = tell(inference.tell(await proved(context, told, inference.level)))
        return told


def _words(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a request says beyond its rows and its purpose, by the names of `Asked`."""
    if parameters.keys() <= _COMMON:
        return {}
    site, subject = _text(parameters, "site"), _text(parameters, "subject")
    if site and not _is_site(site):
        raise MalformedRequestError("parameters.site: is no site's name")
    if subject and len(subject) > 256:
        raise MalformedRequestError("parameters.subject: is longer than 256 characters")
    basis, consent = _text(parameters, "legal_basis"), _text(parameters, "consent")
    if basis and basis not in LEGAL_BASES:
        raise MalformedRequestError(f"parameters.legal_basis: one of {', '.join(sorted(LEGAL_BASES))}")
    if consent and len(consent) > 256:
        raise MalformedRequestError("parameters.consent: is longer than 256 characters")
    explain = parameters.get("explain", False)
    if type(explain) is not bool:
        raise MalformedRequestError("parameters.explain: is true or false")
    for name, kinds in _NO_EFFECT.items():
        if name in parameters and type(parameters[name]) not in kinds:
            raise MalformedRequestError(
                f"parameters.{name}: is of another kind; leave it out, it has no effect"
            )
    if not parameters.keys() <= _TAKEN:
        unknown = sorted(parameters.keys() - _TAKEN)
        raise MalformedRequestError(f"parameters.{unknown[0][:80]}: is not known; leave it out")
    return {
        "site": site or None,
        "subject": subject or None,
        "legal_basis": basis or None,
        "consent": consent or None,
        "explain": explain,
    }


def served_version(context: Context, model: str, version: str) -> ServedVersion:
    """Return the version that a path names: a digest, `live` or `candidate`; empty: the one that answers.

    Raises:
        ModelNotFoundError, VersionNotFoundError, MalformedRequestError: it names none.
    """
    if not _is_name(model):
        raise MalformedRequestError("the model's name is malformed; GET /v1/models lists the names")
    if version and not _is_version(version):
        raise MalformedRequestError("a version is its digest, 64 hex digits, or `live` or `candidate`")
    return context.live.choose(model, version or None)


def metadata(context: Context, served: ServedVersion) -> dict[str, Any]:
    """Return a model's metadata, as the protocol lays it out."""
    signature = _signature(served)
    listed = [found.version for found in context.live.versions(served.model) if found.is_answering] or [
        served.version
    ]
    return {
        "name": served.model,
        "versions": listed,
        "platform": PLATFORM,
        "inputs": [_line(kind) for kind in signature.inputs()],
        "outputs": [_line(kind) for kind in signature.outputs],
        "properties": {
            "columns": json.dumps([name for name, _ in signature.features]),
            "purposes": json.dumps(list(served.purposes)),
            "state": served.state,
        },
    }


def is_ready(context: Context, served: ServedVersion) -> bool:
    """Whether the version answers requests: an officer made it, and it is loaded or can be."""
    if not served.is_answering:
        return False
    context.predicting.warm.get(served)
    return True


def _signature(served: ServedVersion) -> Signature:
    """The signature of the version's charter, made once for all that bear its digest."""
    found = _signatures.get(served.charter_digest)
    if found is None:
        if len(_signatures) >= _KEPT:
            _signatures.clear()
        found = _signatures[served.charter_digest] = Signature.of(served.charter)
    return found


def _line(kind: Any) -> dict[str, Any]:
    return {"name": kind.name, "datatype": kind.datatype, "shape": list(kind.shape)}


def _parameters(answered: Answered) -> dict[str, str | int]:
    shown: dict[str, str | int] = {
        "decision_id": answered.request_id,
        "entry_id": answered.entry_id,
        "leaf_index": answered.leaf_index,
        "leaf_hash": answered.leaf_hash,
        "model_digest": answered.version,
        "policies": ",".join(answered.decision.policies),
        "policy_set": answered.decision.policy_set,
        "level": answered.level,
        "receipt": write_json(answered.receipt).decode(),
        "opened": write_json(answered.opened).decode(),
    }
    if answered.sealed is not None:
        shown["sealed"] = write_json(answered.sealed).decode()
    if answered.proof is not None:
        shown["proof"] = answered.proof
    if answered.review:
        shown["review_required"] = True
        shown["review_id"] = answered.review
    if answered.annotations:
        shown["annotations"] = write_json(dict(answered.annotations)).decode()
    return shown


def _check_outputs(ask: InferAsk, signature: Signature) -> None:
    if not ask.outputs:
        return
    known = [kind.name for kind in signature.outputs]
    for name in ask.outputs:
        if name not in known:
            raise TensorError(name, f"is no output; the model gives {', '.join(known)}")


def _level(parameters: Mapping[str, Any]) -> Level:
    match parameters.get("wait", "sequenced"):
        case "sequenced":
            return "sequenced"
        case "checkpointed":
            return "checkpointed"
        case "witnessed":
            return "witnessed"
        case _:
            raise MalformedRequestError("parameters.wait: is sequenced, checkpointed or witnessed")


def _timeout_s(parameters: Mapping[str, Any]) -> float:
    """How long the request may take, which the protocol's clients say in microseconds; 0: they do not."""
    value = parameters.get("timeout", 0)
    if type(value) is not int or value < 0:
        raise MalformedRequestError("parameters.timeout: is a whole number of microseconds")
    return value / 1e6


def _text(parameters: Mapping[str, Any], name: str) -> str:
    """Return a text that is given, or "" where none is: an empty one would say what nobody can have meant."""
    if name not in parameters:
        return ""
    value = parameters[name]
    if not isinstance(value, str):
        raise MalformedRequestError(f"parameters.{name}: is not a text")
    if not value:
        raise MalformedRequestError(f"parameters.{name}: is empty; give it, or leave it out")
    return value
