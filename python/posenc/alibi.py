"""Attention with linear biases (ALiBi, Press et al. 2021, https://arxiv.org/abs/2108.12409).

Query i is at key position ``query_offset + i``, and the bias of key j is ``-slopes[h] * |query_offset + i - j|``. The
default of ``query_offset`` is ``k_len - q_len``: the last query is at the last key. Distances are integers. Products
and sums are float32 (float64 for float64 scores) and rounded once. With ``causal``, keys beyond the position of the
query are minus infinity. ``slopes`` is ``[H]``: float32, or float64 if the scores or the result are float64.
"""

from typing import Optional, Tuple, Union

import torch
import torch.distributed
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


def alibi_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    scale: Optional[float] = None,
    causal: bool = False,
    query_offset: Optional[int] = None,
    seqlens_q: Optional[Tensor] = None,
    seqlens_k: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
) -> Tensor:
    """Attention with linear biases without scores in memory: memory grows with Sq + Sk, not with their product.

    ``softmax over j of (scale * q_i . k_j + bias[h, i, j])``, times v. On GPUs of compute capability 9.0, a fused cuDNN
    kernel computes float16 and bfloat16. All other calls are computed in blocks of matrix products, which is slower.
    q, k, v and slopes have first and second derivatives in memory that grows likewise. Autocast casts q, k and v.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed sequences ``[T, Hq, D]``: float16, bfloat16, float32 or float64, any strides.
        k: ``[B, Sk, Hk, D]`` or ``[Tk, Hk, D]``, like ``v``, of the dtype of ``q``; Hq is a multiple of Hk.
        slopes: ``[Hq]``: float32, or float64 with float64 q.
        scale: factor of the products of queries and keys. Default: ``1 / sqrt(D)``.
        causal: hide the keys beyond the position of the query.
        query_offset: key position of query 0. Default: the last query of a sequence is at its last key.
        seqlens_q: with ``seqlens_k``, lengths of a right-padded batch: int32 or int64 ``[B]`` on the device of ``q``.
            Set both, or one and ``query_offset``. Values past the lengths may be NaN.
        cu_seqlens_q: with ``cu_seqlens_k``, the first token of each of N packed sequences and the end of the last one:
            int32 or int64 ``[N + 1]``. ``cu_seqlens_k`` defaults to ``cu_seqlens_q``. Required for packed tensors.
        max_seqlen_q: with ``max_seqlen_k``, at least the length of the longest packed sequence; required on a GPU.

    Returns:
        A tensor of the shape and dtype of ``q``. Queries without a visible key give zeros and have zero gradients.

    Raises:
        RuntimeError: naming the argument, what was expected and what came, before anything is launched.

    Example::

        slopes = posenc.alibi_slopes(32).to(q.device)
        out = posenc.alibi_attention(q, k, v, slopes, causal=True)
    """
    return alibi_attention_with_lse(
        q,
        k,
        v,
        slopes,
        scale=scale,
        causal=causal,
        query_offset=query_offset,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )[0]


def alibi_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    scale: Optional[float] = None,
    causal: bool = False,
    query_offset: Optional[int] = None,
    seqlens_q: Optional[Tensor] = None,
    seqlens_k: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
) -> Tuple[Tensor, Tensor]:
    """:func:`alibi_attention` with the log-sum-exp (lse) of the logits of each row.

    Outputs over parts of the keys can be merged by it: ``out = sum of exp(lse_i - lse) out_i`` with
    ``lse = logsumexp of lse_i``. Both results have gradients.

    Args:
        q: as in :func:`alibi_attention`, as are ``k``, ``v``, ``slopes``, ``scale``, ``causal``, ``query_offset``,
            ``seqlens_q``, ``seqlens_k``, ``cu_seqlens_q``, ``cu_seqlens_k``, ``max_seqlen_q`` and ``max_seqlen_k``.

    Returns:
        ``(out, lse)``; lse is ``[B, Hq, Sq]``, or ``[Hq, T]`` for packed sequences, float32 (float64 for float64), and
        minus infinity for queries without a visible key.
    """
    return _ops.alibi_attention(
        q,
        k,
        v,
        slopes,
        scale=scale,
        causal=causal,
        query_offset=query_offset,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )


def context_parallel_alibi_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    group: Union[str, "torch.distributed.ProcessGroup"],
    *,
    scale: Optional[float] = None,
    causal: bool = False,
) -> Tensor:
    """:func:`alibi_attention` over sequences that are divided among the C ranks of a process group.

    Each sequence is 2 C chunks of equal length. Rank r holds chunks r and 2 C - 1 - r, in this order. Keys and values
    are passed around the ranks (ring attention, Liu et al. 2023, https://arxiv.org/abs/2310.01889, section 3). All
    ranks must call it in the same order, with the same shapes, dtypes and options. There are first derivatives only.
    The gradient of the slopes is the contribution of the queries of this rank: reduce it like that of any parameter.

    Args:
        q: ``[B, S / C, Hq, D]``: float16, bfloat16, float32 or float64. S / C is even.
        k: ``[B, S / C, Hk, D]``, like ``v``, of the dtype and device of ``q``.
        slopes: ``[Hq]``: float32, or float64 with float64 q. The same on all ranks.
        group: the ranks, in the order of the chunks, or the name that the group is registered by.
        scale: factor of the products of queries and keys. Default: ``1 / sqrt(D)``.
        causal: hide the keys beyond the position of the query.

    Returns:
        A tensor of the shape and dtype of ``q``.
    """
    name = group if isinstance(group, str) else group.group_name
    return _ops.context_parallel_alibi_attention(q, k, v, slopes, name, scale=scale, causal=causal)[0]
