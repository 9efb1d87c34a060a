"""What the routes read and write, as the OpenAPI document shows it."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.watching import Level

PURPOSE_PATTERN: Final = r"^[a-z0-9][a-z0-9 ._-]{0,62}$"
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,62}$"
DIGEST_PATTERN: Final = r"^[0-9a-f]{64}$"

VERSION_PATTERN: Final = r"^(?:[0-9a-f]{64}|live|candidate)$"

Value = str | int | float | bool | None
LegalBasis = Literal[
    "consent", "contract", "legal_obligation", "vital_interests", "public_task", "legitimate_interests",
    "health_care", "public_health", "research",
]  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PredictRequest(_Strict):
    """Rows to answer, each a feature by its charter name, and what the answer is for."""

    purpose: Annotated[
        str,
        Field(pattern=PURPOSE_PATTERN, description="One of the purposes that the model's charter allows."),
    ]
    rows: Annotated[
        list[dict[str, Value]],
        Field(min_length=1, description="One object a row: feature name to value, in the charter's units."),
    ]
    site: Annotated[
        str | None,
        Field(
            default=None,
            pattern=r"^[a-z0-9][a-z0-9-]{0,62}$",
            description="Whose intercept to use, where the model has one per site; absent means their mean.",
        ),
    ]
    version: Annotated[
        str | None,
        Field(
            default=None,
            pattern=VERSION_PATTERN,
            description="Insist on this version, by digest or as `live` or `candidate`; absent means the "
            "live one, or a canary by its share. Only what an officer made answer does.",
        ),
    ]

    explain: Annotated[
        bool,
        Field(default=False, description="Attribute each answer to its features; at most 16 rows a request."),
    ]

    subject: Annotated[
        str | None,
        Field(
            default=None,
            min_length=1,
            max_length=256,
            description="Your own id for the person that the rows are about. It never enters the log: the "
            "entry holds a random pseudonym, and what it says of the person can be exported and erased.",
        ),
    ]

    legal_basis: Annotated[
        LegalBasis | None,
        Field(default=None, description="Your legal basis, a word for GDPR Art. 6 or 9. Yours to claim."),
    ]

    consent: Annotated[
        str | None,
        Field(
            default=None,
            min_length=1,
            max_length=256,
            description="Your reference of the person's consent, for legal basis `consent`. It goes to the "
            "vault with all else about `subject`, which it needs.",
        ),
    ]

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [{"purpose": "triage", "rows": [{"mean_radius_mm": 14.2, "mean_texture": 19.1}]}]
        },
    )


class DecisionView(BaseModel):
    """Which policies allowed the answer."""

    id: str
    policies: list[str]
    policy_set: str


class EntryRef(BaseModel):
    """A place in the log."""

    leaf_index: int
    leaf_hash: str
    id: Annotated[
        str | None, Field(default=None, description="Of an answer: what `/v1/receipts/{id}` takes.")
    ]


class Opened(BaseModel):
    """What opens one row's commitments. Keep it: nobody else holds the salts.

    Of many rows in one entry, `row` and `path` make it that row's own receipt: they lead to the entry's root.
    """

    input_salt: str
    output_salt: str
    input: str
    output: str
    row: Annotated[str | None, Field(default=None, description="Of many: the row's number, from 0.")]
    path: Annotated[
        str | None, Field(default=None, description="Its inclusion path: base64 hashes, joined by commas.")
    ]


class SealedView(BaseModel):
    """Of a request that names a person: the pseudonym in the entry, and what opens the entry's context."""

    subject: str
    context_salt: str
    context: str


class ReviewView(BaseModel):
    """A person must review this decision before anything with legal effect rests on it (GDPR Art. 22)."""

    id: str
    url: str
    final: bool
    reason: Annotated[str, Field(description="Why no review can make it final; empty where one can.")] = ""


class PredictResponse(BaseModel):
    """Answers in the order of the rows, and all that is needed to prove them later."""

    model: str
    version: str
    answers: list[dict[str, Any]]
    decision: DecisionView
    entry: EntryRef
    receipt: dict[str, Any]
    level: Level
    proof: Annotated[
        str | None, Field(description="C2SP tlog-proof of the entry, when the level is above sequenced.")
    ]
    opened: list[Opened]
    sealed: SealedView | None = None
    review_required: bool = False
    review: ReviewView | None = None
    annotations: Annotated[
        dict[str, Any], Field(default_factory=dict, description="What was added to the answer, by name.")
    ]


class Problem(BaseModel):
    """RFC 9457. Decide by `code`: it is stable; `detail` is for people."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    instance: str
    policies: list[str] | None = None
    entry: EntryRef | None = None
    fields: list[dict[str, Any]] | None = None
    erasure: EntryRef | None = None
    proof: dict[str, Any] | None = None

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:affidavit:problem:predict.denied",
                    "title": "Refused by policy",
                    "status": 403,
                    "code": "predict.denied",
                    "detail": "predict on breast-cancer is refused to role consumer by purpose-…",
                    "instance": "urn:affidavit:request:0f4bd1f2f0a54a0c9d3f0d6f0a1b2c3d",
                    "policies": ["purpose-outside-charter"],
                    "entry": {"leaf_index": 171, "leaf_hash": "9f2c…"},
                }
            ]
        }
    )


class KeyRequest(_Strict):
    """A key to make."""

    role: str
    expires: Annotated[str | None, Field(default=None, description="RFC 3339, UTC; absent means never.")]
    note: Annotated[str, Field(default="", max_length=80)]
    site: Annotated[
        str, Field(default="", max_length=63, description="For a node: the site whose entries it may read.")
    ]
    region: Annotated[str, Field(default="", max_length=63, description="Where its holder asks from.")]
    models: Annotated[
        list[str], Field(default_factory=list, max_length=64, description="The only models it may ask.")
    ]
    certificate: Annotated[
        str,
        Field(
            default="",
            max_length=64,
            description="Hex SHA-256 of a client certificate, in place of a secret; see `mtls_header`.",
        ),
    ]


class RotateRequest(_Strict):
    """How long the old key still counts."""

    overlap_s: Annotated[int, Field(default=86_400, ge=0, le=30 * 86_400)]


class ReviewRequest(_Strict):
    """What a person made of a decision. With `officer` and `signature` their own key says so."""

    outcome: Literal["confirmed", "overturned"]
    reason: Annotated[
        str, Field(max_length=200, description="A file number or a word; it must name nobody.")
    ] = ""
    officer: Annotated[str, Field(max_length=60, description="Public key, `ed25519:…`.")] = ""
    signature: Annotated[
        str, Field(max_length=88, description="Base64, over the entry's body without it; see the docs.")
    ] = ""


class AlarmRequest(_Strict):
    """What a drift job of your own found; the model does not answer until an officer closes the alarm."""

    kind: Literal["drift"] = "drift"
    model: Annotated[str, Field(pattern=NAME_PATTERN)]
    measure: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$", description="Such as `psi_age`.")]
    value: Annotated[str, Field(max_length=40, description="Decimal text.")]
    threshold: Annotated[str, Field(max_length=40, description="Decimal text, which `value` passed.")]
    window_s: Annotated[int, Field(ge=0, le=10**9, description="Over how long it was measured.")]


class AlarmCloseRequest(_Strict):
    """Why an alarm ends."""

    reason: Annotated[str, Field(min_length=1, max_length=200)]


class PolicyRequest(_Strict):
    """A change of rules, signed by an officer: the body of a `policy.changed` entry, and one permission."""

    policy_set: Annotated[str, Field(pattern=DIGEST_PATTERN)]
    schema_digest: Annotated[str, Field(pattern=DIGEST_PATTERN)]
    text: Annotated[str, Field(max_length=49_152)]
    previous_change: Annotated[str, Field(pattern=DIGEST_PATTERN)]
    officer: Annotated[str, Field(max_length=60)]
    reason: Annotated[str, Field(max_length=200)]
    signature: Annotated[str, Field(max_length=88)]
    lock_out: Annotated[
        bool, Field(description="Put them in force although no officer could read or change them then.")
    ] = False


Subject = Annotated[
    str, Field(min_length=1, max_length=256, description="The person's id, as predictions named it.")
]


class SubjectRequest(_Strict):
    """A person, in the body: an id in a path or a query would stay in the logs of every proxy."""

    subject: Subject


class ErasureRequest(_Strict):
    """A person to erase."""

    subject: Subject
    request_id: Annotated[
        str | None,
        Field(
            default=None,
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
            description="Your file number for the request; it goes into the log, so it must name nobody. The "
            "same one again gives the same answer.",
        ),
    ]


class CosignatureRequest(_Strict):
    """One signature line of a C2SP signed note, made by an enrolled site's witness key."""

    note_signature: str
    site: str


PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        401: "`access.unauthenticated`: no key, or one that is unknown, revoked or expired",
        403: "`access.denied`: `policies` names what decided, `entry` the log's record of it",
        404: "the thing that was named does not exist",
        410: "`vault.erased`: it was erased; `erasure` names the entry that says so, `proof` proves yours",
        409: "not in this state: `detail` says in which it is",
        422: "`request.malformed`: `fields` names each field and the fix",
        501: "`explain.not_available`: this server cannot explain this model's answers",
        504: "`request.deadline`: no answer within `X-Request-Timeout`",
        429: "`predict.quota`: the caller's quota is used up, whatever else; come back after `Retry-After`",
        503: "the log could not record the request, so there is no answer; come back after `Retry-After`",
    }.items()
}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """Return the OpenAPI text of a body that the route parses itself, strictly."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI `responses` for these statuses."""
    return {status: PROBLEMS[status] for status in statuses}
