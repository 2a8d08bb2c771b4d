"""Attention with linear biases (ALiBi, Press et al. 2021, https://arxiv.org/abs/2108.12409).

Query i is at key position ``query_offset + i``, and the bias of key j is ``-slopes[h] * |query_offset + i - j|``. The
default of ``query_offset`` is ``k_len - q_len``: the last query is at the last key. Distances are integers. Products
and sums are float32 (float64 for float64 scores) and rounded once. With ``causal``, keys beyond the position of the
query are minus infinity. ``slopes`` is ``[H]``: float32, or float64 if the scores or the result are float64.
"""

from typing import Optional

import torch
from torch import Tensor

_ops = torch.ops.posenc


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> Tensor:
    """The published slopes: for ``n = 2^k`` heads ``2^(-max_bias (h + 1) / n)``. For other numbers of heads: the slopes
    of the power of two below, followed by every other slope of the power of two above, not sorted.

    Args:
        num_heads: H, positive. With tensor parallelism take the slice of the whole model's slopes.
        max_bias: positive; 8 in the paper.

    Returns:
        float32 ``[H]`` on the CPU.
    """
    return _ops.alibi_slopes(num_heads, max_bias)


def alibi_bias(
    slopes: Tensor,
    q_len: int,
    k_len: int,
    *,
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
    query_offset: Optional[int] = None,
) -> Tensor:
    """The bias as a tensor. :func:`alibi_add` and :func:`alibi_softmax` compute the bias without storing it.

    Args:
        slopes: see :mod:`posenc.alibi`.
        q_len: number of queries, Sq.
        k_len: number of keys, Sk.
        causal: minus infinity for keys beyond the position of the query.
        dtype: float16, bfloat16, float32 or float64.
        query_offset: position of query 0; default ``k_len - q_len``.

    Returns:
        ``[H, Sq, Sk]``, contiguous, on the device of ``slopes``.

    Raises:
        RuntimeError: naming the argument, what was expected and what came, before anything is launched.
    """
    return _ops.alibi_bias(slopes, q_len, k_len, causal=causal, dtype=dtype, query_offset=query_offset)


def alibi_add(scores: Tensor, slopes: Tensor, *, causal: bool = False, query_offset: Optional[int] = None) -> Tensor:
    """``scores + bias`` in one pass.

    Args:
        scores: ``[B, H, Sq, Sk]`` or ``[H, Sq, Sk]``: float16, bfloat16, float32 or float64, any strides.
        slopes: see :mod:`posenc.alibi`, as for ``causal`` and ``query_offset``.

    Returns:
        A new tensor of the shape and dtype of ``scores``.
    """
    return _ops.alibi_add(scores, slopes, causal=causal, query_offset=query_offset)


def alibi_add_(scores: Tensor, slopes: Tensor, *, causal: bool = False, query_offset: Optional[int] = None) -> Tensor:
    """:func:`alibi_add` in place.

    Args:
        scores: as in :func:`alibi_add`; neither a leaf that requires a gradient nor a tensor whose elements share
            memory.
        slopes: see :mod:`posenc.alibi`, as for ``causal`` and ``query_offset``.

    Returns:
        ``scores``.
    """
    _ops.alibi_add_(scores, slopes, causal=causal, query_offset=query_offset)
    return scores


def alibi_softmax(
    scores: Tensor,
    slopes: Tensor,
    *,
    scale: float = 1.0,
    causal: bool = False,
    key_padding_mask: Optional[Tensor] = None,
    query_offset: Optional[int] = None,
) -> Tensor:
    """``softmax(scale * scores + bias + mask)`` over the keys, in one pass.

    Args:
        scores: as in :func:`alibi_add`, as are ``slopes``, ``causal`` and ``query_offset``.
        scale: factor of the scores, not of the bias.
        key_padding_mask: ``[B, Sk]`` bool on the device of ``scores``, True where a key is hidden.

    Returns:
        Probabilities of the shape and dtype of ``scores``. Rows without a visible key and their gradients are zero.

    Example::

        p = posenc.alibi_softmax(q @ k.mT, slopes, scale=head_dim**-0.5, causal=True)
    """
    return _ops.alibi_softmax(
        scores, slopes, scale=scale, causal=causal, key_padding_mask=key_padding_mask, query_offset=query_offset
    )
