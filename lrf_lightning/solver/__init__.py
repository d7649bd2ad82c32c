"""The joint low-rank solver: torch alone, without Lightning, Hydra and W&B."""

from lrf_lightning.solver.evaluation import StepOutput
from lrf_lightning.solver.result import Certificate, FrontierPoint, LayerResult
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.solution import Solution

__all__ = ["Certificate", "FrontierPoint", "LayerResult", "Settings", "Solution", "StepOutput"]
