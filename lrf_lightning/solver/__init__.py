"""The joint low-rank solver: pure torch, without Lightning, Hydra, W&B or files."""

from lrf_lightning.solver.evaluation import StepOutput
from lrf_lightning.solver.result import Certificate, FrontierPoint, LayerResult
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.solution import Solution

__all__ = ["Certificate", "FrontierPoint", "LayerResult", "Settings", "Solution", "StepOutput"]
