"""``nn.MultiheadAttention`` with four separate linear layers, so that each projection can be factorized.

``nn.MultiheadAttention`` hands its weights to a function instead of calling layers; nothing can be observed or replaced
inside. :class:`SplitAttention` computes the same from the layers ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

Nested tensors, which torch's fused inference paths use, are not supported; see
:mod:`lrf_lightning.surgery.padded_outputs`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SplitAttention"]


class SplitAttention(nn.Module):
    """Attention with the arguments, the call and the results of ``nn.MultiheadAttention``.

    Built by :meth:`from_packed`, taken back by :meth:`to_packed`. Letters used in the code::

        N  batch          H  heads             E  embed_dim
        L  queries        D  E / H             S  keys

    Attributes:
        q_proj: linear layer for queries, embed_dim to embed_dim.
        k_proj: linear layer for keys, kdim to embed_dim.
        v_proj: linear layer for values, vdim to embed_dim.
        out_proj: linear layer for the output, embed_dim to embed_dim.
        bias_k: key that is appended to all keys, None if there is none.
        bias_v: value that is appended to all values, None if there is none.
    """

    PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
    # nn.TransformerEncoderLayer takes its fused path, which needs a packed weight, only where these say so
    _qkv_same_embed_dim = False
    in_proj_weight = None
    in_proj_bias = None

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kdim: int,
        vdim: int,
        dropout: float,
        add_zero_attn: bool,
        batch_first: bool,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim, self.dropout = kdim, vdim, dropout
        self.add_zero_attn, self.batch_first = add_zero_attn, batch_first

    @classmethod
    def from_packed(cls, attention: nn.MultiheadAttention, *, copy: bool = True) -> SplitAttention:
        """Split an ``nn.MultiheadAttention``.

        Args:
            attention: the module, which is not changed.
            copy: whether parameters are copied; otherwise they share their storage with the module's, to look at.
        """
        new = cls(
            attention.embed_dim,
            attention.num_heads,
            kdim=attention.kdim,
            vdim=attention.vdim,
            dropout=attention.dropout,
            add_zero_attn=attention.add_zero_attn,
            batch_first=attention.batch_first,
        )

        def parameter(part: Tensor, whole: Tensor) -> nn.Parameter:
            part = part.detach()
            return nn.Parameter(part.clone() if copy else part, requires_grad=whole.requires_grad)

        in_bias, out_bias = attention.in_proj_bias, attention.out_proj.bias
        if attention.in_proj_weight is not None:
            packed: Tensor = attention.in_proj_weight
            weights = [parameter(part, packed) for part in packed.chunk(3)]
        else:
            separate = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            weights = [parameter(weight, weight) for weight in separate]
        biases = [None] * 3 if in_bias is None else [parameter(part, in_bias) for part in in_bias.chunk(3)]
        weights.append(parameter(attention.out_proj.weight, attention.out_proj.weight))
        biases.append(None if out_bias is None else parameter(out_bias, out_bias))
        for name, weight, bias in zip(cls.PROJECTIONS, weights, biases, strict=True):
            new.add_module(name, _linear(weight, bias))
        for name in ("bias_k", "bias_v"):
            extra = getattr(attention, name)
            new.register_parameter(name, None if extra is None else parameter(extra, extra))
        return new.train(attention.training)

    def to_packed(self) -> nn.MultiheadAttention:
        """The ``nn.MultiheadAttention`` that computes the same; all four projections must be dense."""
        projections = [getattr(self, name) for name in self.PROJECTIONS]
        weight, bias = projections[0].weight, projections[0].bias
        packed = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=bias is not None,
            add_bias_kv=self.bias_k is not None,
            add_zero_attn=self.add_zero_attn,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device=weight.device,
            dtype=weight.dtype,
        )
        weights = [projection.weight for projection in projections]
        pairs: list[tuple[Tensor | None, list[Tensor | None]]] = [
            (packed.in_proj_bias, [projection.bias for projection in projections[:3]]),
            (packed.out_proj.weight, [weights[3]]),
            (packed.out_proj.bias, [projections[3].bias]),
            (packed.bias_k, [self.bias_k]),
            (packed.bias_v, [self.bias_v]),
        ]
        if packed.in_proj_weight is not None:
            pairs.append((packed.in_proj_weight, list(weights[:3])))
        else:
            separate = (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
            pairs += [(whole, [part]) for whole, part in zip(separate, weights[:3], strict=True)]
        for whole, parts in pairs:
            present = [part.detach() for part in parts if part is not None]
            if whole is not None and present:
                with torch.no_grad():
                    whole.copy_(torch.cat(present))
                whole.requires_grad_(any(part.requires_grad for part in parts if part is not None))
        return packed.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention.forward``.

        Raises:
            RuntimeError: if ``is_causal`` is set without ``attn_mask``.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint that attn_mask is the causal mask; give attn_mask too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (self._heads(x) for x in (self.q_proj(query), *self._keys_and_values(key, value)))  # (N, H, ., D)
        extra = k.shape[2] - key.shape[1]
        mask = _merged_mask(attn_mask, key_padding_mask, q, extra)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))  # (N, L, E)
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _keys_and_values(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Projected keys and values with what is appended to them, each (N, S + extra, E)."""
        k, v = self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None and self.bias_v is not None:
            rows = (k.shape[0], 1, self.embed_dim)
            k, v = torch.cat([k, self.bias_k.expand(rows)], 1), torch.cat([v, self.bias_v.expand(rows)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def extra_repr(self) -> str:
        """The geometry."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _merged_mask(
    attn_mask: Tensor | None,  # (L, S) or (N * H, L, S)
    key_padding_mask: Tensor | None,  # (N, S)
    q: Tensor,  # (N, H, L, D)
    extra: int,  # keys that were appended, never masked
) -> Tensor | None:
    """Both masks as one that is added to the scores, broadcastable to (N, H, L, S + extra)."""
    merged = None
    if attn_mask is not None:
        merged = F.pad(_additive(attn_mask, q.dtype), (0, extra))
        if merged.dim() == 3:
            merged = merged.reshape(*q.shape[:2], *merged.shape[1:])
    if key_padding_mask is not None:
        padding = F.pad(_additive(key_padding_mask, q.dtype), (0, extra))[:, None, None]
        merged = padding if merged is None else merged + padding
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask, -math.inf)
    return mask.to(dtype)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    linear.register_parameter("bias", bias)
    return linear
