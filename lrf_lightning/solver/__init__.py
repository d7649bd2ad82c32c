"""The joint low-rank solver: torch alone, without Lightning, Hydra and W&B.

In the order of a solve, which :mod:`~lrf_lightning.solver.joint` goes through on one ``workspace``:

====================  ==================================================================================================
the task              ``settings``, ``devices``, ``agreement`` of the processes
running a model       ``evaluation``, ``loss_terms``, ``batch_contents``, ``seeded_batches``, ``buffers``
looking inside        ``hooks``, ``backward_passes``, ``layer_input``, ``rows``, ``conv_rows``, ``row_readers``
what is known         ``statistics``, ``moments``, ``layer_statistics``, ``spectra``
components            ``factorization``, ``conv_orders``
predictions           ``curves``, ``probes``, ``forecast``, all of them in ``calibration``; ``paper``
costs and ranks       ``latency``, ``latency_cache``, ``rank_options``, ``allocation``
factors for ranks     ``compensation`` in ``lockstep`` with ``own_attributes``; ``batch_norm``
measured models       ``frontier``, ``budgets``, ``point_models``, ``layer_results``, ``pareto``
choice and verdict    ``objectives``, ``acceptance``, ``intervals``, ``certificate``, ``temperature``, ``changes``
size and speed        ``model_size``, ``model_call``, ``peak_memory``, ``speed``, ``speed_result``
what comes back       ``result``, ``solution``
====================  ==================================================================================================
"""

from lrf_lightning.solver.evaluation import StepOutput
from lrf_lightning.solver.result import Certificate, FrontierPoint, LayerResult
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.solution import Solution

__all__ = ["Certificate", "FrontierPoint", "LayerResult", "Settings", "Solution", "StepOutput"]
