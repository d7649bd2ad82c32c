"""The joint low-rank solver: pure torch, without Lightning, Hydra, W&B or files."""

from lrf_lightning.solver.evaluation import StepOutput
from lrf_lightning.solver.result import Certificate, FrontierPoint, LayerResult, Solution
from lrf_lightning.solver.settings import Settings

__all__ = ["Certificate", "FrontierPoint", "LayerResult", "Settings", "Solution", "StepOutput"]
