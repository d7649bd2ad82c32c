"""The joint low-rank solver: torch alone, without Lightning, Hydra and W&B.

In the order of a solve, which :mod:`~lrf_lightning.solver.joint` goes through on one
:mod:`~lrf_lightning.solver.workspace`; a folder imports only what stands above it:

===============  =======================================================================================================
the task         ``settings``, ``devices``, ``agreement`` of the processes
what comes back  ``result`` with ``speed_result`` and ``model_size``; in the end they are in the ``solution``
``running``      ``evaluation`` with ``loss_terms``; ``batch_contents``, ``seeded_batches``, ``state``; ``hooks``;
                 ``lockstep`` of paused passes with ``own_attributes``
``verdict``      ``intervals``, ``temperature``, ``certificate``, ``changes``
``layers``       ``statistics`` in ``backward_passes``: ``layer_statistics`` of ``moments``, ``rows``, ``conv_rows``,
                 ``row_readers``, ``layer_input``; ``latency``, ``latency_cache``; ``layer_curve``; ``spectra``
``factors``      ``factorization``, ``conv_orders``, ``decomposition``, ``compensation``, ``compressed_copies``,
                 ``batch_norm``
``ranks``        ``rank_options``, ``allocation``, ``paper``
``predictions``  ``curves``, ``probes``, both of them in ``calibration``; ``forecast``
``points``       ``frontier``, ``budgets``, ``acceptance``, ``objectives``, ``pareto``, ``layer_results``,
                 ``point_models``
``speed``        ``comparison``, ``model_call``, ``peak_memory``
===============  =======================================================================================================
"""

from lrf_lightning.solver.result import Certificate, FrontierPoint, LayerResult
from lrf_lightning.solver.running.evaluation import StepOutput
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.solution import Solution

__all__ = ["Certificate", "FrontierPoint", "LayerResult", "Settings", "Solution", "StepOutput"]
