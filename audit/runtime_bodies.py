"""Bodies of the entries that serving writes beside each prediction: exports, and shadows' answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionExported:
    """A version's weights as a file that a runtime serves; made from charter and weights, and measured."""

    model: str
    version: str
    charter: str
    format: str  # "onnx"
    digest: str  # SHA-256 of the file
    size_bytes: int
    opset: int
    precision: str  # "float64"
    tolerance: str  # how far an answer may lie from the definition's
    difference: str  # how far one did, at most
    rows: int  # over how many rows
    runtime: str  # what ran the file


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionShadowed:
    """What a version under trial would have answered; told to nobody, sealed in the vault."""

    model: str
    version: str
    transition: str  # leaf hash of the transition that made it a shadow
    answered: str  # leaf hash of the prediction that was given
    rows: int
    context: str  # root of the sealed part that holds the answers (`audit.disclosure`)
    subject: str  # pseudonym under which they are sealed
    sealed: str  # SHA-256 of the ciphertext in the vault
