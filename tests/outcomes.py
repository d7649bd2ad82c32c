"""Outcomes as a test wants them."""

import torch

from lrf_lightning.solver.running.evaluation import Outcome


def outcome(losses, scores=None, **more):
    losses = torch.as_tensor(losses, dtype=torch.float64)
    scores = None if scores is None else torch.as_tensor(scores, dtype=torch.float64)
    return Outcome(losses, torch.ones(len(losses), dtype=torch.float64), scores, **more)
