"""Attention without scores in memory, with or without linear biases (ALiBi): memory grows with Sq + Sk, not with their
product. float16 and bfloat16 are fused on GPUs of compute capability 8.0 and later. All other calls on a GPU are
computed in blocks of matrix products, which is slower.
"""

from typing import Optional, Tuple, Union

import torch
import torch.distributed
from torch import Tensor

_ops = torch.ops.posenc


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slopes: Optional[Tensor] = None,
    scale: Optional[float] = None,
    causal: bool = False,
    query_offset: Optional[int] = None,
    seqlens_q: Optional[Tensor] = None,
    seqlens_k: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    window_left: Optional[int] = None,
    window_right: Optional[int] = None,
    softcap: Optional[float] = None,
    sinks: Optional[Tensor] = None,
) -> Tensor:
    """``softmax over j of (scale * q_i . k_j + bias[h, i, j])``, times v.

    The bias is that of :mod:`posenc.alibi` if there are slopes, else 0. q, k, v and slopes have first and second
    derivatives in memory that grows with Sq + Sk. Autocast casts q, k and v.

    Args:
        q: ``[B, Sq, Hq, D]``, or packed sequences ``[T, Hq, D]``: float16, bfloat16, float32 or float64, any strides.
        k: ``[B, Sk, Hk, D]`` or ``[Tk, Hk, D]``, like ``v``, of the dtype of ``q``; Hq is a multiple of Hk.
        slopes: slopes of linear biases (ALiBi): ``[Hq]``, or one row for each sequence, ``[B, Hq]`` (packed:
            ``[N, Hq]``); float32, or float64 with float64 ``q``. Default: no bias.
        scale: factor of the products of queries and keys. Default: ``1 / sqrt(D)``.
        causal: hide the keys beyond the position of the query.
        query_offset: key position of query 0. Default: the last query of a sequence is at its last key.
        seqlens_q: with ``seqlens_k``, lengths of a right-padded batch: int32 or int64 ``[B]`` on the device of ``q``.
            Set both, or one and ``query_offset``. Values past the lengths may be NaN.
        cu_seqlens_q: with ``cu_seqlens_k``, the first token of each of N packed sequences and the end of the last one:
            int32 or int64 ``[N + 1]``. ``cu_seqlens_k`` defaults to ``cu_seqlens_q``. Required for packed tensors.
        max_seqlen_q: with ``max_seqlen_k``, at least the length of the longest packed sequence; required on a GPU.
        window_left: with ``window_right``, a sliding window: a query at key position p sees keys ``p - window_left`` to
            ``p + window_right``. Not negative. Default: not limited.
        softcap: a positive number c: scaled products s become ``c * tanh(s / c)``, before bias and mask (Gemma 2,
            https://arxiv.org/abs/2408.00118, section 2). Default: s.
        sinks: attention sinks: a logit for each head whose exponential is added to the sum of the softmax, without a
            value (gpt-oss). ``[Hq]``: float32, or float64 with float64 ``q``. Default: none.

    Returns:
        A tensor of the shape and dtype of ``q``. Queries without a visible key give zeros and have zero gradients.

    Raises:
        RuntimeError: naming the argument, what was expected and what came, before anything is launched.

    Example::

        out = posenc.attention(q, k, v, causal=True)
    """
    return attention_with_lse(
        q,
        k,
        v,
        slopes=slopes,
        scale=scale,
        causal=causal,
        query_offset=query_offset,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        sinks=sinks,
    )[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slopes: Optional[Tensor] = None,
    scale: Optional[float] = None,
    causal: bool = False,
    query_offset: Optional[int] = None,
    seqlens_q: Optional[Tensor] = None,
    seqlens_k: Optional[Tensor] = None,
    cu_seqlens_q: Optional[Tensor] = None,
    cu_seqlens_k: Optional[Tensor] = None,
    max_seqlen_q: Optional[int] = None,
    max_seqlen_k: Optional[int] = None,
    window_left: Optional[int] = None,
    window_right: Optional[int] = None,
    softcap: Optional[float] = None,
    sinks: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """:func:`attention` with the log-sum-exp (lse) of the logits of each row.

    Outputs over parts of the keys can be merged by it: ``out = sum of exp(lse_i - lse) out_i`` with
    ``lse = logsumexp of lse_i``. Both results have gradients.

    Args:
        q: as in :func:`attention`, as are ``k``, ``v``, ``slopes``, ``scale``, ``causal``, ``query_offset``,
            ``seqlens_q``, ``seqlens_k``, ``cu_seqlens_q``, ``cu_seqlens_k``, ``max_seqlen_q``, ``max_seqlen_k``,
            ``window_left``, ``window_right``, ``softcap`` and ``sinks``.

    Returns:
        ``(out, lse)``; lse is ``[B, Hq, Sq]``, or ``[Hq, T]`` for packed sequences, float32 (float64 for float64), and
        minus infinity for queries without a visible key.
    """
    results = _ops.alibi_attention(
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
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
    )
    return results if sinks is None else _ops.attention_sinks(*results, sinks)


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
    window_left: Optional[int] = None,
    window_right: Optional[int] = None,
    softcap: Optional[float] = None,
    sinks: Optional[Tensor] = None,
) -> Tensor:
    """:func:`attention` with slopes: attention with linear biases (ALiBi, Press et al. 2021,
    https://arxiv.org/abs/2108.12409).

    Args:
        q: as in :func:`attention`, as are ``k``, ``v``, ``slopes``, ``scale``, ``causal``, ``query_offset``,
            ``seqlens_q``, ``seqlens_k``, ``cu_seqlens_q``, ``cu_seqlens_k``, ``max_seqlen_q``, ``max_seqlen_k``,
            ``window_left``, ``window_right``, ``softcap`` and ``sinks``.

    Returns:
        A tensor of the shape and dtype of ``q``.

    Example::

        slopes = posenc.alibi_slopes(32).to(q.device)
        out = posenc.alibi_attention(q, k, v, slopes, causal=True)
    """
    return attention_with_lse(
        q,
        k,
        v,
        slopes=slopes,
        scale=scale,
        causal=causal,
        query_offset=query_offset,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        sinks=sinks,
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
    window_left: Optional[int] = None,
    window_right: Optional[int] = None,
    softcap: Optional[float] = None,
    sinks: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """:func:`attention_with_lse` with slopes.

    Args:
        q: as in :func:`attention`, as are ``k``, ``v``, ``slopes``, ``scale``, ``causal``, ``query_offset``,
            ``seqlens_q``, ``seqlens_k``, ``cu_seqlens_q``, ``cu_seqlens_k``, ``max_seqlen_q``, ``max_seqlen_k``,
            ``window_left``, ``window_right``, ``softcap`` and ``sinks``.

    Returns:
        ``(out, lse)``.
    """
    return attention_with_lse(
        q,
        k,
        v,
        slopes=slopes,
        scale=scale,
        causal=causal,
        query_offset=query_offset,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        sinks=sinks,
    )


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Union[str, "torch.distributed.ProcessGroup"],
    *,
    slopes: Optional[Tensor] = None,
    scale: Optional[float] = None,
    causal: bool = False,
) -> Tensor:
    """:func:`attention` over sequences that are divided among the C ranks of a process group.

    Each sequence is 2 C chunks of equal length. Rank r holds chunks r and 2 C - 1 - r, in this order. Keys and values
    are passed around the ranks (ring attention, Liu et al. 2023, https://arxiv.org/abs/2310.01889, section 3). All
    ranks must call it in the same order, with the same shapes, dtypes and options. There are first derivatives only.
    The gradient of the slopes is the contribution of the queries of this rank: reduce it like that of any parameter.

    Args:
        q: ``[B, S / C, Hq, D]``: float16, bfloat16, float32 or float64. S / C is even.
        k: ``[B, S / C, Hk, D]``, like ``v``, of the dtype and device of ``q``.
        group: the ranks, in the order of the chunks, or the name that the group is registered by.
        slopes: as in :func:`attention`, the same on all ranks.
        scale: factor of the products of queries and keys. Default: ``1 / sqrt(D)``.
        causal: hide the keys beyond the position of the query.

    Returns:
        A tensor of the shape and dtype of ``q``.
    """
    name = group if isinstance(group, str) else group.group_name
    return _ops.context_parallel_alibi_attention(q, k, v, slopes, name, scale=scale, causal=causal)[0]


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
    """:func:`context_parallel_attention` with slopes.

    Args:
        q: as in :func:`context_parallel_attention`, as are ``k``, ``v``, ``slopes``, ``group``, ``scale`` and
            ``causal``.

    Returns:
        A tensor of the shape and dtype of ``q``.
    """
    return context_parallel_attention(q, k, v, group, slopes=slopes, scale=scale, causal=causal)
