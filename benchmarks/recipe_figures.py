"""What the rows of :mod:`benchmarks.recipes` say: whose they are, and how their figures are told."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "BUDGETS", "GOOD", "METHODS", "NAMES", "Rows", "in_points", "is_share", "percent_kept", "rows_of", "score_factor",
    "score_name", "seeds_of", "smallest_holding", "tested_score_name",
]  # fmt: skip

Rows = Sequence[dict[str, str]]
BUDGETS = (0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # shares of the factorizable layers, unless others are asked for
METHODS = ("plain SVD", "activation-whitened SVD", "frontier")  # measured at the same sizes
NAMES = {"frontier": "this package"}
GOOD = ("better", "not worse")


def seeds_of(rows: Rows) -> list[str]:
    """All seeds, ascending."""
    return sorted({row["seed"] for row in rows}, key=int)


def rows_of(rows: Rows, method: str, seed: str | None = None) -> list[dict[str, str]]:
    """The rows of one method, of one seed or of all, by seed and from the largest model to the smallest."""
    found = [row for row in rows if row["method"] == method and seed in (None, row["seed"])]
    return sorted(found, key=lambda row: (int(row["seed"]), -float(row["keep"] or 0)))


def percent_kept(row: dict[str, str], what: str = "model") -> float:
    """Parameters after over those before; ``what`` is ``model``, ``layers`` or ``factorized``."""
    return 100 * float(row[f"params_{what}_after"]) / float(row[f"params_{what}_before"])


def smallest_holding(rows: Rows, method: str, seed: str) -> dict[str, str] | None:
    """The last size, from the largest down, before the first that is neither `better` nor `not worse`.

    Verdicts of several sizes hold together if they are tested in a fixed order that ends with the first failure.
    """
    found = None
    for row in rows_of(rows, method, seed):
        if row["verdict"] not in GOOD:
            break
        found = row
    return found


def score_name(rows: Rows) -> str:
    """The score of the verdict."""
    return next((row["score_name"] for row in rows if row["score_name"]), "score")


def tested_score_name(rows: Rows) -> str:
    """The score that the recipe logs for the test split, which may be another one than that of the verdict."""
    return next((row["test_score_name"] for row in rows if row["test_score_name"]), "score")


def is_share(name: str) -> bool:
    """Whether a score is told in points, as a share of the samples."""
    return name in ("accuracy", "acc")


def in_points(rows: Rows) -> bool:
    """Whether the verdict's score is told in points."""
    return is_share(score_name(rows))


def score_factor(rows: Rows) -> float:
    """What the verdict's score is multiplied with to be told."""
    return 100.0 if in_points(rows) else 1.0
