"""The verdict of a result in plain words, with the margins and the number of samples beside it."""

from __future__ import annotations

import math

from lrf_lightning.reports.tables import share
from lrf_lightning.solver.result import Certificate, Interval
from lrf_lightning.solver.solution import Solution

__all__ = ["decimals", "score_name", "signed", "temperature_sentence", "verdict_sentence"]


def verdict_sentence(result: Solution) -> str:
    """One or two sentences on what was gained, what it cost, and how sure that is.

    A model is called "not worse" or "better" only if the certificate says so, whatever the objective is called.
    """
    certificate: Certificate | None = result.certificate
    if certificate is None:
        return f"No verdict: {_size(result)}, but it was not compared with the original. {result.message}".strip()
    if certificate.verdict == "unchanged" or not result.ranks:
        return f"Unchanged: nothing was compressed. {result.message}"
    samples = f"{certificate.dense.samples:,} verification samples"
    if certificate.loss_change.pairs != certificate.dense.samples:
        samples += f" (compared in {certificate.loss_change.pairs:,} batches)"
    changes = _changes(result, certificate)
    if certificate.verdict == "inconclusive":
        return (
            f"Inconclusive: {_size(result)}, but {samples} are too few to tell whether it is worse: "
            f"{changes}.{_needed(certificate)}"
        )
    opening = {"better": "Better", "not worse": "Not worse", "worse": "Worse"}[certificate.verdict]
    return f"{opening}: {_size(result)}. On {samples} {changes}."


def temperature_sentence(certificate: Certificate | None) -> str:
    """How much of the losses is a matter of confidence, empty for models that are no classifiers.

    Truncation scales logits, which can lower a cross-entropy without any better decision. With its best temperature a
    model has no such reserve, so the scaled losses compare like with like.
    """
    if certificate is None:
        return ""
    if certificate.no_temperature:
        return f"There is no best temperature to compare at: {certificate.no_temperature}."
    if certificate.scaled_dense_loss is None:
        return ""
    sentence = f"At its best temperature the original's loss is {certificate.scaled_dense_loss:.4f}"
    if certificate.temperature is not None:
        sentence += f" (temperature {certificate.temperature:.2f}, fitted on the selection split)"
    if certificate.scaled_compressed_loss is None:
        return sentence + "."
    sentence += f", the compressed model's {certificate.scaled_compressed_loss:.4f}."
    lower = certificate.loss_change.upper < 0
    if lower and certificate.scaled_compressed_loss >= certificate.scaled_dense_loss:
        # a temperature below 1 sharpens: the original was not confident enough
        kind = "more" if certificate.temperature is not None and certificate.temperature < 1 else "less"
        sentence += f" So the lower loss comes from {kind} confident predictions, not from better ones."
    return sentence


def score_name(result: Solution) -> str:
    """What the score is called, ``score`` unless the result knows its name."""
    return result.score_name or "score"


def decimals(scale: float) -> int:
    """Decimal places that show two digits of ``scale``, between 0 and 8; 4 for a scale that is not positive."""
    if not math.isfinite(scale) or scale <= 0:
        return 4
    return min(max(1 - math.floor(math.log10(scale)), 0), 8)


def signed(value: float, places: int) -> str:
    """A number with its sign; a value that is not finite reads ``nan``, ``+inf`` or ``-inf``."""
    # adding 0 turns -0.0 into 0.0
    return f"{round(value, places) + 0.0:+.{places}f}" if math.isfinite(value) else f"{value:+}".replace("+nan", "nan")


def _size(result: Solution) -> str:
    before, after = result.params_model
    kept, kept_layers = share(after, before), share(result.params_layers[1], result.params_layers[0])
    if kept is None:
        return "the compressed model has no parameters"
    fewer = f"{100 * (1 - kept):.1f} % fewer" if after <= before else f"{100 * (kept - 1):.1f} % more"
    layers = "" if kept_layers is None else f"; {100 * (1 - kept_layers):.1f} % fewer in the factorizable layers"
    return f"the compressed model has {fewer} parameters ({after:,} of {before:,}{layers})"


def _changes(result: Solution, certificate: Certificate) -> str:
    """The change of loss and score, each with the bound that matters and its margin."""
    percent = f"{100 * certificate.confidence:g} %"
    loss, bound, margin = certificate.loss_change, _loss_bound(certificate), certificate.loss_margin
    places = _telling_places(bound, 0.0 if certificate.verdict == "better" else margin, decimals(margin))
    text = (
        f"its loss changed by {signed(loss.mean, places)} "
        f"({percent} bound {signed(bound, places)}, margin {margin:.{places}f})"
    )
    score = certificate.score_change
    if score is None:
        return text
    # differences of 0 and 1 per sample are shares of samples, so that points are their natural unit
    factor, unit = (100.0, " points") if score.method == "tango" else (1.0, "")
    bound, margin = factor * _score_bound(certificate, score), factor * certificate.score_margin
    places = _telling_places(bound, -margin, decimals(margin))
    pairs = "" if score.pairs == loss.pairs else f"; compared in {score.pairs:,} batches"
    if pairs and score.pairs == certificate.dense.samples:
        pairs = "; compared sample by sample"
    return (
        f"{text} and its {score_name(result)} by {signed(factor * score.mean, places)}{unit} "
        f"(bound {signed(bound, places)}, margin {margin:.{places}f}{pairs})"
    )


def _telling_places(bound: float, limit: float, places: int) -> int:
    """At least ``places``, and as many more, up to 8, as show on which side of a limit a bound lies."""
    if not math.isfinite(bound) or bound == limit:
        return places
    return next((more for more in range(places, 8) if round(bound, more) != round(limit, more)), 8)


def _loss_bound(certificate: Certificate) -> float:
    """The upper bound, or the lower one where even that is outside of the margin."""
    loss = certificate.loss_change
    return loss.lower if loss.lower > certificate.loss_margin else loss.upper


def _score_bound(certificate: Certificate, score: Interval) -> float:
    return score.upper if score.upper < -certificate.score_margin else score.lower


def _needed(certificate: Certificate) -> str:
    needed = certificate.samples_needed
    if needed is None or needed <= certificate.dense.samples:
        return ""
    return f" About {needed:,} samples would be expected to decide it."
