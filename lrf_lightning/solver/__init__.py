"""The joint low-rank solver: torch alone, without Lightning, Hydra and W&B.

In the order of imports, since a folder imports only what stands above it; the order of a solve is that of
:mod:`~lrf_lightning.solver.joint`:

===============  =======================================================================================================
the task         ``settings``, ``devices``, ``agreement`` of the processes
what comes back  ``result`` with ``speed_result`` and ``model_size``
``running``      ``evaluation`` with ``loss_terms``; ``batch_contents``, ``seeded_batches``; ``hooks``; ``state``, which
                 is restored; ``own_attributes`` of passes, ``lockstep`` of paused ones
``verdict``      ``intervals``, ``temperature``, ``certificate``, ``changes``
``layers``       ``statistics`` in ``backward_passes``: ``layer_statistics`` of ``moments``, ``rows``, ``conv_rows``,
                 ``row_readers``, ``layer_input``; ``latency``, ``latency_cache``; ``spectra``; ``layer_curve``, the
                 record of what is predicted
what is shared   ``workspace``, which all stages below work on
``factors``      ``factorization``, ``conv_orders``, ``decomposition``, ``compensation``, ``compressed_copies``
``ranks``        ``rank_options``, ``allocation``, ``paper``
``predictions``  ``curves``, ``probes``, both of them in ``calibration``; ``forecast``
``points``       ``frontier`` with ``batch_norm``, ``budgets``, ``acceptance``, ``objectives``, ``pareto``,
                 ``layer_results``, ``point_models``
``speed``        ``comparison``, ``model_call``, ``peak_memory``
the whole        ``solution``, ``joint``
===============  =======================================================================================================
"""

from lrf_lightning.solver.result import Certificate, FrontierPoint, LayerResult
from lrf_lightning.solver.running.evaluation import StepOutput
from lrf_lightning.solver.settings import Settings
from lrf_lightning.solver.solution import Solution

__all__ = ["Certificate", "FrontierPoint", "LayerResult", "Settings", "Solution", "StepOutput"]
