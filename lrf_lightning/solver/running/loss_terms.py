"""The tokens, pixels or outputs that a sample's loss is the mean of; predictions need them apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LossTerms"]


@dataclass(frozen=True)
class LossTerms:
    """Parts of every sample's loss, such as those of its tokens or pixels.

    Attributes:
        values: shape (batch, t), differentiable; a row adds up to the sample's loss, and what does not count is 0.
        count: number of terms that every sample's loss is a mean of, shape (batch,), or one number for all; of shape
            (batch, t) what every term is divided by in the sum, which is that number where it is a mean.
    """

    values: Tensor
    count: Tensor | float

    @classmethod
    def of(cls, losses: Tensor, counts: Tensor | None = None, *, samples_alike: bool = False) -> LossTerms:
        """Terms of losses per token, pixel or output.

        Args:
            losses: shape (batch, ...), differentiable.
            counts: which of them count, of the same shape; None for all. The others are taken for 0.
            samples_alike: whether the batch's loss is the mean over the samples of the means over their own terms.
                Otherwise it is the mean over all terms, in which a sample counts by their number.

        Raises:
            ValueError: if the shapes differ, or nothing counts.
        """
        rows = losses.reshape(len(losses), -1)
        if counts is None:
            return cls(rows / rows.shape[1], rows.shape[1])
        if counts.shape != losses.shape:
            raise ValueError(
                f"counts has shape {tuple(counts.shape)}, but losses {tuple(losses.shape)}; both must agree"
            )
        mask = counts.bool().reshape(len(rows), -1)
        own = mask.sum(1)
        if not bool(own.all() if samples_alike else own.any()):
            raise ValueError("counts marks no term of a sample; leave such samples out, since they have no loss")
        count: Tensor | float = own.to(rows) if samples_alike else float(own.sum()) / len(rows)
        rows = rows.masked_fill(~mask, 0.0)
        return cls(rows / (count[:, None] if isinstance(count, Tensor) else count), count)

    @classmethod
    def weighted(cls, values: Tensor, weights: Tensor) -> LossTerms:
        """Terms of a weighted sum.

        Args:
            values: shape (batch, t), the terms times their weights, differentiable.
            weights: of the same shape; their signs do not matter.
        """
        inverse = weights.detach().abs().reciprocal()
        return cls(values, inverse.masked_fill(weights == 0, 0.0))

    @property
    def per_sample(self) -> Tensor:
        """The loss of every sample, shape (batch,)."""
        return self.values.sum(1)

    @property
    def mean_count(self) -> float:
        """The number of terms per sample."""
        count = torch.as_tensor(self.count, dtype=torch.float64)
        return float(count[count > 0].mean() if bool((count > 0).any()) else count.mean())

    def scattered(self, generator: torch.Generator) -> Tensor:
        """The terms of every sample added up with random signs, times the root of their number, shape (batch,).

        A sample's loss is the mean over T negative log-likelihoods l_t. Its curvature along a direction is about the
        mean over t of the squared derivative of l_t, which is the mean of the squared derivative of what is returned
        here. The squared derivative of the sample's loss itself is up to T times smaller, because the gradients of its
        terms, which hardly correlate, average out. In a sum of terms with weights w_t the curvature is the sum of w_t
        times the squared derivative of l_t, so w_t l_t is divided by the root of w_t.

        Args:
            generator: of the signs, on the CPU.
        """
        signs = torch.randint(2, self.values.shape, generator=generator, device="cpu").to(self.values) * 2 - 1
        roots = torch.as_tensor(self.count, device=signs.device).to(signs).sqrt()
        if roots.dim() == 2:
            return (self.values * signs * roots).sum(1)
        return (self.values * signs).sum(1) * roots

    def check(self, loss: Tensor, size: int) -> None:
        """Check that the terms add up to a loss.

        Args:
            loss: shape (batch,) or () for their mean.
            size: samples in the batch.

        Raises:
            ValueError: if the shapes do not fit, or the sums differ by more than 1 % or a few roundings.
        """
        if self.values.dim() != 2 or len(self.values) != size:
            raise ValueError(
                f"terms have the shape {tuple(self.values.shape)} for a batch of {size} samples; allowed is "
                f"({size}, t). See LossTerms.of"
            )
        wanted, found = loss.detach().double(), self.per_sample.detach().double()
        found = found if loss.dim() == 1 else found.mean()
        relative = max(1e-2, 4 * torch.finfo(loss.dtype).eps)
        if torch.isfinite(wanted).all() and not torch.allclose(found, wanted, rtol=relative, atol=1e-6):
            raise ValueError(
                f"terms add up to a mean loss of {float(found.mean()):.6g}, but it is {float(wanted.mean()):.6g}; "
                "every row must add up to its sample's loss. See LossTerms.of"
            )
