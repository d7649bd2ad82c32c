"""Losses taken apart into tokens."""

import pytest
import torch

from lrf_lightning import LossTerms


class TestLossTerms:
    """Two ways to take a mean over tokens, of which some are padding."""

    ROWS = torch.tensor([[1.0, 2.0, torch.nan], [3.0, 4.0, 5.0]])
    COUNTS = torch.tensor([[1, 1, 0], [1, 1, 1]])

    def test_all_tokens_alike(self):
        terms = LossTerms.of(self.ROWS, self.COUNTS)
        torch.testing.assert_close(terms.per_sample.mean(), torch.tensor(15 / 5))
        assert terms.count == terms.mean_count == 2.5

    def test_all_samples_alike(self):
        terms = LossTerms.of(self.ROWS, self.COUNTS, samples_alike=True)
        torch.testing.assert_close(terms.per_sample, torch.tensor([1.5, 4.0]))
        torch.testing.assert_close(terms.count, torch.tensor([2.0, 3.0]))
        assert terms.mean_count == 2.5

    @pytest.mark.parametrize("samples_alike", [False, True])
    def test_the_mean_square_over_the_signs(self, samples_alike):
        """For one number per sample: the number of terms times the sum of their squares."""
        terms = LossTerms.of(self.ROWS, self.COUNTS, samples_alike=samples_alike)
        generator = torch.Generator().manual_seed(0)
        squares = torch.stack([terms.scattered(generator).square() for _ in range(4000)]).mean(0)
        torch.testing.assert_close(squares, terms.values.square().sum(1) * terms.count, rtol=0.1, atol=0)

    def test_a_mask_in_half_precision_counts_right(self):
        rows = torch.ones(2, 70_000)
        assert LossTerms.of(rows, torch.ones_like(rows, dtype=torch.float16)).count == 70_000

    def test_one_term_per_sample(self):
        torch.testing.assert_close(LossTerms.of(torch.tensor([1.0, 2.0])).per_sample, torch.tensor([1.0, 2.0]))

    @pytest.mark.parametrize("samples_alike", [False, True])
    def test_nothing_that_counts(self, samples_alike):
        with pytest.raises(ValueError, match="counts marks no term"):
            LossTerms.of(self.ROWS, torch.zeros(2, 3), samples_alike=samples_alike)

    def test_shapes_that_differ(self):
        with pytest.raises(ValueError, match=r"counts has shape \(2,\), but losses \(2, 3\)"):
            LossTerms.of(self.ROWS, torch.ones(2))
