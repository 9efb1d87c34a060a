"""What a charter still lacks before sites can sign it: their keys, row counts, the public set, the noise.

A simulation or a first trial writes a charter without them; `complete_charter` adds what is missing and
changes nothing that is there. Everything added is a constant that becomes public with the charter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from audit.decimals import decimal_text
from federation.accounting import calibrate_noise
from federation.charter import Charter
from federation.strict_yaml import parse_yaml

CharterSource = Charter | str | Path | Mapping[str, Any]

DEFAULT_PURPOSE: Final = "simulation"
_PROVISIONAL_NOISE: Final = 8


def complete_charter(
    source: CharterSource,
    *,
    identities: Mapping[str, str],
    rows: Mapping[str, int],
    officers: Mapping[str, str] | None = None,
    public_set: bytes | None = None,
    public_rows: int = 0,
) -> Charter:
    """Return a charter that the sites of `identities` can sign.

    Args:
        source: a charter, its file, its YAML text, or the same as a mapping.
        identities: each site's identity key; they replace whatever keys the source has.
        rows: each site's number of rows to make public, where the source says none and the unit is no site.
        officers: used where the source names none.
        public_set: the public file's bytes; its digest goes into the charter.
        public_rows: how many rows that file has.

    Raises:
        CharterError, CharterFileError: the source breaks a rule; names line, key and fix.
        AccountingError: no noise gives the epsilon asked for.
    """
    document = read_source(source)
    terms = document.get("privacy")
    if isinstance(terms, dict) and terms.get("unit") == "site":
        rows = dict.fromkeys(identities, 1)  # how many rows a site has is not made public
    given = {str(site.get("name")): site for site in _list(document.get("sites")) if isinstance(site, dict)}
    document["sites"] = [
        {"nominal_rows": rows[name], **given.get(name, {}), "name": name, "identity": identities[name]}
        for name in sorted(identities)
    ]
    document.setdefault("affidavit", 1)
    document.setdefault("purposes", [DEFAULT_PURPOSE])
    if officers and not document.get("officers"):
        document["officers"] = [{"name": name, "key": key} for name, key in sorted(officers.items())]
    if public_set is not None:
        document["public_set"] = {"digest": hashlib.sha256(public_set).hexdigest(), "rows": public_rows}
    privacy = document.get("privacy")
    if not isinstance(privacy, dict) or "noise_multiplier" in privacy:
        return Charter.parse(yaml_of(document))
    privacy["noise_multiplier"] = _PROVISIONAL_NOISE
    draft = Charter.parse(yaml_of(document))
    privacy["noise_multiplier"] = calibrate_noise(
        epsilon=draft.privacy.epsilon,
        delta=draft.privacy.delta,
        rounds=draft.most_rounds,
        local_steps=draft.noised_steps,
        sample_rate=draft.privacy.sample_rate,
        relation=draft.privacy.relation,
        dimension=draft.dimension,
        grid_bits=draft.privacy.grid_bits,
        precision=draft.privacy.precision,
    )
    return Charter.parse(yaml_of(document))


def read_source(source: CharterSource) -> dict[str, Any]:
    """Return a charter, complete or not, as a mapping of its own.

    Raises:
        CharterFileError: the text is not the strict YAML, or no mapping.
    """
    if isinstance(source, Mapping):
        text = yaml_of(source)
    elif isinstance(source, Charter):
        text = source.to_yaml()
    elif isinstance(source, Path):
        text = source.read_text(encoding="utf-8")
    else:
        text = source
    value = parse_yaml(text, source=str(source) if isinstance(source, Path) else "").value
    if not isinstance(value, dict):
        return dict(Charter.parse(text).document)  # raises, and says why
    return value


def yaml_of(document: Mapping[str, Any]) -> str:
    """Return a mapping as YAML: one top-level key a line, values in flow style, numbers as written."""
    return "".join(f"{key}: {_flow(value)}\n" for key, value in document.items())


def _flow(value: Any) -> str:
    if value is None or isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (int, float, Decimal)):
        return decimal_text(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(_flow(item) for item in value) + "]"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
