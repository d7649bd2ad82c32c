"""Find the layers of a model that can be factorized, and replace modules by name.

A layer *can* be factorized if its exact type is supported, its weight is a plain dense floating-point parameter, and
some rank saves parameters. Everything else with a weight matrix is left alone, with a reason that ends up in the
report: nothing is skipped silently.

Two kinds of layers are not where they seem to be:

* The projections of an ``nn.MultiheadAttention`` called ``attn`` are known as ``attn.q_proj``, ``attn.k_proj``,
  ``attn.v_proj`` and ``attn.out_proj``. :func:`prepare` splits the module so that they exist, :func:`settle` puts
  back what needs no splitting.
* Layers that share one weight are one candidate under the name of the first; replacing it replaces the others by
  layers that share its factors.
"""

from lrf_lightning.surgery.candidates import Candidate, ConvOrder
from lrf_lightning.surgery.kinds import is_matrix, low_rank_type
from lrf_lightning.surgery.search import Skipped, find_layers
from lrf_lightning.surgery.structure import (
    factorized,
    prepare,
    replace_module,
    restore_dense_structure,
    set_structure,
    settle,
)

__all__ = [
    "Candidate",
    "ConvOrder",
    "Skipped",
    "factorized",
    "find_layers",
    "is_matrix",
    "low_rank_type",
    "prepare",
    "replace_module",
    "restore_dense_structure",
    "set_structure",
    "settle",
]
