r"""Low-rank layers that stand in for dense ones.

A dense weight of shape (out, in) is replaced by two factors::

    weight (out, in)  ~  left_factor (out, rank) @ right_factor (rank, in)

      x ---[ right_factor ]---> rank channels ---[ left_factor ]---> + bias ---> y

Every kind of layer has one class, which also knows how the weight of its dense layer is seen as matrices, one per group
(:meth:`LowRankModule.matrices`), and which dense layers it cannot stand in for (:meth:`LowRankModule.objection`):

=========================  ===================================  ==========================================
dense layer                right factor                         left factor
=========================  ===================================  ==========================================
``Linear``, HF ``Conv1D``  linear, in to rank                   linear, rank to out
``Conv1d/2d/3d``           the dense layer's kernel and stride  grouped convolution of size 1
``ConvTranspose1d/2d/3d``  grouped convolution of size 1        the dense layer's kernel and stride
``Embedding``              linear, rank to embedding_dim        lookup of num_embeddings rows
=========================  ===================================  ==========================================

In all of them ``left_factor.shape[1]`` is the rank. ``nn.MultiheadAttention`` becomes a :class:`SplitAttention`, whose
projections are ordinary linear layers. The layers hold no copy of the dense weight; ``weight`` is a property that
multiplies the factors, for code that reads it. Nothing here decides on ranks or factors; that is the work of
:mod:`lrf_lightning.solver`.
"""

from lrf_lightning.modules.attention import SplitAttention
from lrf_lightning.modules.base import LowRankModule
from lrf_lightning.modules.conv import LowRankConv1d, LowRankConv2d, LowRankConv3d
from lrf_lightning.modules.conv_transpose import LowRankConvTranspose1d, LowRankConvTranspose2d, LowRankConvTranspose3d
from lrf_lightning.modules.embedding import LowRankEmbedding
from lrf_lightning.modules.linear import LowRankLinear, LowRankTransposedLinear

__all__ = [
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankConvTranspose1d",
    "LowRankConvTranspose2d",
    "LowRankConvTranspose3d",
    "LowRankEmbedding",
    "LowRankLinear",
    "LowRankModule",
    "LowRankTransposedLinear",
    "SplitAttention",
]
