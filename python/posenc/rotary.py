"""Rotary position embedding (RoFormer, Su et al. 2021, https://arxiv.org/abs/2104.09864, eq. 34).

Arguments that all functions share:

``cos``, ``sin``
    ``[P, R/2]``: looked up by position, or row s for token s without ``positions`` (``P >= S``). Or ``[B, S, R/2]``,
    one row for each token, without ``positions``. float32, or float64 for float64 tensors. There is one column for each
    pair: of full-width tables, ``cat(freqs, freqs)``, pass ``table[..., : R // 2]``.
``positions``
    ``[S]`` or ``[B, S]`` (``[T]`` for packed tensors), int32 or int64, on the device of the tensors. With ``pair_axes``
    a dimension of 1 to 4 axes comes first. A position outside the tables gives NaN for its token or, with
    ``pair_axes``, for the pairs that read it. The environment variable ``POSENC_CHECK_POSITIONS=1`` makes it an error.
``interleaved``
    False: pairs are channels ``(i, i + R/2)`` (GPT-NeoX, Llama in Hugging Face's layout). True: ``(2i, 2i + 1)``
    (RoFormer, GPT-J, Llama's own layout).
``conjugate``
    Rotate by the negative angles, which undoes the rotation.
``pair_axes``
    The axis of ``positions`` that each of the R/2 pairs reads, as in M-RoPE (Qwen2-VL, Wang et al. 2024,
    https://arxiv.org/abs/2409.12191, section 2.1). Empty: all pairs read the one position of their token.
"""

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor

_ops = torch.ops.posenc


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Optional[Tensor] = None,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
    pair_axes: Sequence[int] = (),
) -> Tensor:
    """Rotates the first ``R = 2 * cos.size(-1)`` channels of each head of ``x`` by the angles of its token.

    For each pair ``(x1, x2)`` of channels and the table row of the token, ``y1 = x1 cos - x2 sin`` and
    ``y2 = x1 sin + x2 cos``. Channels R to D - 1 are copied. float16 and bfloat16 are computed in float32 and rounded
    once. Differentiable with respect to ``x``, ``cos`` and ``sin``, any number of times; deterministic.

    Args:
        x: ``[B, S, H, D]``, or ``[T, H, D]`` for packed sequences: float16, bfloat16, float32 or float64, any strides.
        cos: see :mod:`posenc.rotary`, as for ``sin``, ``positions``, ``interleaved``, ``conjugate`` and ``pair_axes``.

    Returns:
        A new tensor of the shape and dtype of ``x``, in its memory layout if that is dense.

    Raises:
        RuntimeError: naming the argument, what was expected and what came, before anything is launched.

    Example::

        y = posenc.rotary_embedding(x, cos, sin)
    """
    return _ops.rotary_embedding(
        x, cos, sin, positions, interleaved=interleaved, conjugate=conjugate, pair_axes=pair_axes
    )


def rotary_embedding_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Optional[Tensor] = None,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
    pair_axes: Sequence[int] = (),
) -> Tensor:
    """:func:`rotary_embedding` in place: ``x`` is overwritten by the rotated tensor and not saved.

    Args:
        x: neither a leaf that requires a gradient nor a tensor whose elements share memory.
        cos: as in :func:`rotary_embedding`; likewise ``sin``, ``positions``, ``interleaved``, ``conjugate`` and
            ``pair_axes``. ``cos`` and ``sin`` must not require a gradient, which needs the overwritten input.

    Returns:
        ``x``.
    """
    _ops.rotary_embedding_(x, cos, sin, positions, interleaved=interleaved, conjugate=conjugate, pair_axes=pair_axes)
    return x


def rotary_embedding_qk(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Optional[Tensor] = None,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
    pair_axes: Sequence[int] = (),
) -> Tuple[Tensor, Tensor]:
    """Rotates queries and keys of one attention layer in one launch; everything else as :func:`rotary_embedding`.

    Args:
        q: ``[B, S, Hq, D]`` or ``[T, Hq, D]``.
        k: ``[B, S, Hk, D]`` or ``[T, Hk, D]``, of the dtype and device of ``q``.
        cos: as in :func:`rotary_embedding`; likewise ``sin``, ``positions``, ``interleaved``, ``conjugate`` and
            ``pair_axes``.

    Returns:
        The rotated pair.

    Example::

        q, k = posenc.rotary_embedding_qk(q, k, cos, sin)
    """
    return _ops.rotary_embedding_qk(
        q, k, cos, sin, positions, interleaved=interleaved, conjugate=conjugate, pair_axes=pair_axes
    )


def rotary_embedding_qk_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Optional[Tensor] = None,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
    pair_axes: Sequence[int] = (),
) -> Tuple[Tensor, Tensor]:
    """:func:`rotary_embedding_qk` in place, in one launch; everything else as :func:`rotary_embedding_`.

    Args:
        q: may be a slice of the same packed projection as ``k``, but must not overlap it.
        cos: as in :func:`rotary_embedding_`; likewise ``sin``, ``positions``, ``interleaved``, ``conjugate`` and
            ``pair_axes``.

    Returns:
        ``(q, k)``.
    """
    _ops.rotary_embedding_qk_(
        q, k, cos, sin, positions, interleaved=interleaved, conjugate=conjugate, pair_axes=pair_axes
    )
    return q, k


def rotary_embedding_qkv(
    qkv: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Optional[Tensor] = None,
    *,
    interleaved: bool = False,
    conjugate: bool = False,
    pair_axes: Sequence[int] = (),
) -> Tuple[Tensor, Tensor, Tensor]:
    """Splits a packed projection into rotated queries, rotated keys and values, in one launch that reads it once.

    Args:
        qkv: ``[B, S, (Hq + 2 Hk) D]`` or ``[T, (Hq + 2 Hk) D]``: all heads of q, then of k, then of v. Or
            ``[B, S, 3, H, D]`` or ``[T, 3, H, D]`` with ``Hq = Hk = H``. Any strides.
        num_q_heads: Hq, at least 1.
        num_kv_heads: Hk, at least 1.
        cos: as in :func:`rotary_embedding`; likewise ``sin``, ``positions``, ``interleaved``, ``conjugate`` and
            ``pair_axes``.

    Returns:
        ``(q, k, v)``: new contiguous tensors ``[B, S, Hq, D]`` and twice ``[B, S, Hk, D]``, or ``[T, ..]``.

    Example::

        q, k, v = posenc.rotary_embedding_qkv(linear(x), 32, 8, cos, sin)
    """
    return _ops.rotary_embedding_qkv(
        qkv,
        num_q_heads,
        num_kv_heads,
        cos,
        sin,
        positions,
        interleaved=interleaved,
        conjugate=conjugate,
        pair_axes=pair_axes,
    )


def rotary_embedding_pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Optional[Tensor] = None,
    *,
    stacked: bool = False,
    interleaved: bool = False,
    conjugate: bool = False,
    pair_axes: Sequence[int] = (),
) -> Tensor:
    """Rotates queries and keys and writes them and the unchanged values into one packed tensor.

    With ``conjugate`` flipped it is the inverse of :func:`rotary_embedding_qkv`.

    Args:
        q: ``[B, S, Hq, D]`` or ``[T, Hq, D]``.
        k: ``[B, S, Hk, D]`` or ``[T, Hk, D]``, like ``v``.
        stacked: whether the result is ``[B, S, 3, H, D]`` or ``[T, 3, H, D]``, which requires ``Hq = Hk = H``.
        cos: as in :func:`rotary_embedding`; likewise ``sin``, ``positions``, ``interleaved``, ``conjugate`` and
            ``pair_axes``.

    Returns:
        A new contiguous tensor: ``[B, S, (Hq + 2 Hk) D]`` or ``[T, (Hq + 2 Hk) D]`` unless ``stacked``.
    """
    return _ops.rotary_embedding_pack(
        q,
        k,
        v,
        cos,
        sin,
        positions,
        stacked=stacked,
        interleaved=interleaved,
        conjugate=conjugate,
        pair_axes=pair_axes,
    )


def rotary_tables(
    inv_freq: Tensor, length: int, *, dtype: torch.dtype = torch.float32, attention_factor: float = 1.0
) -> Tuple[Tensor, Tensor]:
    """``(cos, sin)`` of ``position * inv_freq`` for positions 0 to ``length - 1``, from float64 angles.

    Differentiable with respect to ``inv_freq``.

    Args:
        inv_freq: ``[R/2]`` float32 or float64: radians per position.
        length: number of rows of the tables.
        dtype: float32 or float64. bfloat16 tables would be wrong from position 257 on.
        attention_factor: factor of both tables (YaRN, https://arxiv.org/abs/2309.00071, section 3.4).

    Returns:
        Two tensors ``[length, R/2]`` on the device of ``inv_freq``.

    Example::

        cos, sin = posenc.rotary_tables(1 / 10000 ** (torch.arange(0, 128, 2) / 128), 4096)
    """
    return _ops.rotary_tables(inv_freq, length, dtype=dtype, attention_factor=attention_factor)


def qk_norm_rotary_embedding(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Optional[Tensor] = None,
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    interleaved: bool = False,
    conjugate: bool = False,
    pair_axes: Sequence[int] = (),
) -> Tuple[Tensor, Tensor]:
    """RMSNorm over each head, with ``q_weight`` or ``k_weight``, then :func:`rotary_embedding_qk`.

    ``z = x / sqrt(mean(x^2) + eps) * w`` (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, eq. 4, for queries
    and keys as in Henry et al. 2020, https://arxiv.org/abs/2010.04245), then z with its first R channels rotated.
    float16 and bfloat16 are computed in float32 and rounded once, at the end. Differentiable with respect to ``q``,
    ``k``, the weights, ``cos`` and ``sin``, any number of times.

    Args:
        q: as in :func:`rotary_embedding_qk`, like ``k``. On CUDA D is at most 4096.
        q_weight: ``[D]``, like ``k_weight``: both of the dtype of ``q``, or both float32 (float64 for float64).
        cos: as in :func:`rotary_embedding`; likewise ``sin``, ``positions``, ``interleaved``, ``conjugate`` and
            ``pair_axes``.
        eps: positive.
        unit_offset: whether the weight is ``1 + w`` (Gemma 3) instead of ``w`` (Qwen3).

    Returns:
        New tensors of the shapes and dtype of ``q`` and ``k``.

    Example::

        q, k = posenc.qk_norm_rotary_embedding(q, k, q_weight, k_weight, cos, sin)
    """
    return _ops.qk_norm_rotary_embedding(
        q,
        k,
        q_weight,
        k_weight,
        cos,
        sin,
        positions,
        eps=eps,
        unit_offset=unit_offset,
        interleaved=interleaved,
        conjugate=conjugate,
        pair_axes=pair_axes,
    )
