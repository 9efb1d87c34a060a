"""The demo's data: breast cancer cells measured under a microscope, dealt to four hospitals as CSV files.

569 patients from scikit-learn (Wolberg, Street, Mangasarian 1995): thirty measurements of cell nuclei and a
diagnosis. 114 patients, stratified, become the held-out set that the charter declares public; 455 are dealt
to four hospitals of unequal size and mix. Bounds are declared here, wider than any sensible measurement,
and all thirty are positive and skewed, so the charter declares the log transform. The seed deals rows and
nothing else: no noise.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Final

DEALING_SEED: Final = 20_241_123
LABEL: Final = "diagnosis"
CLASSES: Final = ("benign", "malignant")

_BOUNDS: Final[dict[str, tuple[str, str, str, str, str, str, str]]] = {
    # measurement: unit, then lower and upper of the mean, of its standard error, and of the worst
    "radius": ("px", "5", "30", "0.1", "3", "5", "40"),
    "texture": ("grey levels", "5", "40", "0.3", "5", "10", "50"),
    "perimeter": ("px", "40", "200", "0.5", "25", "50", "300"),
    "area": ("px^2", "100", "3000", "5", "600", "150", "5000"),
    "smoothness": ("1", "0.05", "0.2", "0.001", "0.04", "0.05", "0.25"),
    "compactness": ("1", "0.01", "0.4", "0.002", "0.15", "0.02", "1.2"),
    "concavity": ("1", "0.001", "0.5", "0.0005", "0.4", "0.002", "1.3"),
    "concave_points": ("1", "0.001", "0.25", "0.0005", "0.06", "0.002", "0.3"),
    "symmetry": ("1", "0.1", "0.35", "0.005", "0.08", "0.15", "0.7"),
    "fractal_dimension": ("1", "0.04", "0.1", "0.0005", "0.03", "0.05", "0.25"),
}


_GRID_BITS: Final = 24

_CHARTER: Final = """\
# Four hospitals train one model that tells benign from malignant cells under the microscope.
affidavit: 1
name: breast-cytology
task: binary

# Bounds say what the instrument can measure, not what anybody's data hold. Values beyond are clamped.
features:
{features}
label: {{name: {label}, classes: [{classes}]}}

model: {{family: logistic_regression}}
plan: {{strategy: fedavg, rounds: {rounds}, learning_rate: 6, round_timeout_s: 20, minimum_sites: 4}}

privacy:
  unit: row                 # one row is one patient here
  relation: add_remove
  epsilon: {epsilon}
  delta: {delta}
  max_grad_norm: 1
  noise_multiplier: {noise}     # what the accountant asks for at this epsilon
  grid_bits: {grid_bits}

sites:
{sites}

public_set: {{digest: {public_digest}, rows: {public_rows}}}
gates:
  - {{metric: auc, source: public_set, margin_over_baseline: 0.4}}
  - {{metric: accuracy, source: public_set, margin_over_baseline: 0.15}}

purposes: [diagnosis-support]
officers:
{officers}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hospital:
    name: str
    malignant: int
    benign: int

    @property
    def rows(self) -> int:
        return self.malignant + self.benign


HOSPITALS: Final = (
    Hospital(name="eastfield", malignant=10, benign=45),
    Hospital(name="northgate", malignant=85, benign=95),
    Hospital(name="riverside", malignant=35, benign=95),
    Hospital(name="st-olaf", malignant=40, benign=50),
)
PUBLIC_ROWS: Final = 114


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    name: str
    unit: str
    lower: str
    upper: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoFiles:
    """Where the demo's CSV files are."""

    sites: dict[str, Path]  # by hospital
    public: Path


def features() -> tuple[Feature, ...]:
    """The thirty columns with their declared unit and bounds, in the order of the files."""
    columns: list[Feature] = []
    for kind, offset in (("mean_{}", 1), ("{}_error", 3), ("worst_{}", 5)):
        for measurement, row in _BOUNDS.items():
            name = kind.format(measurement)
            columns.append(Feature(name=name, unit=row[0], lower=row[offset], upper=row[offset + 1]))
    return tuple(columns)


def write_demo_files(folder: Path, *, seed: int = DEALING_SEED) -> DemoFiles:
    """Write the four hospitals' CSV files and the public set; return where they are.

    `seed` only deals rows to files; it never reaches sampling or noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.csv" for name in (*(h.name for h in HOSPITALS), "public")}
    for name, rows in deal(seed).items():
        _write_csv(paths[name], rows)
    public = paths.pop("public")
    return DemoFiles(sites=paths, public=public)


def demo_charter(
    *,
    public: Path,
    identities: Mapping[str, str],
    officers: Mapping[str, str],
    epsilon: str = "3",
    delta: str = "0.00001",
    rounds: int = 30,
) -> str:
    """Return the demo's charter as YAML; the noise is what the accountant says `epsilon` needs.

    Args:
        public: the public set's file; the charter names its digest.
        identities: each hospital's identity key.
        officers: name to public key of whoever may approve versions.
        epsilon: for the whole run, at `delta`, for each site's population.
        delta: below one in the number of patients.
        rounds: how many releases epsilon pays for.
    """
    from federation.accounting import calibrate_noise

    noise = calibrate_noise(
        epsilon=Decimal(epsilon),
        delta=Decimal(delta),
        rounds=rounds,
        dimension=len(features()) + 1,
        grid_bits=_GRID_BITS,
    )
    rows = {hospital.name: hospital.rows for hospital in HOSPITALS}
    return _CHARTER.format(
        features="\n".join(
            f'  - {{name: {f.name}, type: number, unit: "{f.unit}", lower: {f.lower}, upper: {f.upper}, '
            "transform: log}"
            for f in features()
        ),
        label=LABEL,
        classes=", ".join(CLASSES),
        rounds=rounds,
        epsilon=epsilon,
        delta=delta,
        noise=noise,
        grid_bits=_GRID_BITS,
        sites="\n".join(
            f'  - {{name: {name}, identity: "{identities[name]}", nominal_rows: {rows[name]}}}'
            for name in sorted(identities)
        ),
        public_digest=hashlib.sha256(public.read_bytes()).hexdigest(),
        public_rows=PUBLIC_ROWS,
        officers="\n".join(f'  - {{name: {name}, key: "{key}"}}' for name, key in sorted(officers.items())),
    )


def deal(seed: int = DEALING_SEED) -> dict[str, list[list[str]]]:
    """Deal the 569 patients: rows of text by hospital, and "public"; every patient goes to one place."""
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    random = Random(seed)  # noqa: S311 - deals public rows to files
    rows: dict[str, list[list[str]]] = {diagnosis: [] for diagnosis in CLASSES}
    for values, target in zip(bunch.data, bunch.target, strict=True):
        diagnosis = CLASSES[1] if target == 0 else CLASSES[0]
        rows[diagnosis].append([repr(float(value)) for value in values] + [diagnosis])
    for group in rows.values():
        random.shuffle(group)
    dealt: dict[str, list[list[str]]] = {}
    for hospital in HOSPITALS:
        dealt[hospital.name] = [rows["malignant"].pop() for _ in range(hospital.malignant)]
        dealt[hospital.name] += [rows["benign"].pop() for _ in range(hospital.benign)]
    dealt["public"] = rows["malignant"] + rows["benign"]
    for group in dealt.values():
        random.shuffle(group)
    return dealt


def _write_csv(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([feature.name for feature in features()] + [LABEL])
        writer.writerows(rows)
