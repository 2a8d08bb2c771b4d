#pragma once

#include <posenc/export.h>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <optional>
#include <tuple>

/// Rotary position embedding (RoFormer, Su et al. 2021, https://arxiv.org/abs/2104.09864, eq. 34) as
/// dispatcher operators: `posenc::rotary_embedding` and `posenc::rotary_embedding_qk`, both also in place, and
/// `posenc::rotary_embedding_qkv` for packed projections, with kernels for CPU, CUDA and Meta, and derivatives of any
/// order.
namespace posenc {

/// Rotates the first `R = 2 * cos.size(-1)` channels of every head of `x` by the angle of its token.
///
/// With pair `(x1, x2)` of one head and the table row of its token,
///
///     y1 = x1 cos - x2 sin,    y2 = x1 sin + x2 cos;
///
/// channels `R` to `D - 1` pass through. Narrow dtypes are computed in float32 and rounded once.
///
/// NaN and infinity follow from these two lines and go no further: one in `x` reaches its own pair, of one head of one
/// token; one in a table its pair of all tokens that read the row. The same holds for gradients of `x`; in those of the
/// tables, a NaN in `x` or in the gradient of the output reaches its pair of the row that its token read.
///
/// @param x  `[B, S, H, D]`, or `[T, H, D]` for packed sequences: float16, bfloat16, float32 or float64, any
///   strides (also 0) without a copy. Other layouts are views of these, made with `transpose`.
/// @param cos,sin  `[P, R/2]`: looked up by position, or row s for token s where `positions` is absent
///   (`P >= S`). Or `[B, S, R/2]` (B may be 1), one row a token, for `x` of four dimensions and without `positions`.
///   float32, or float64 when `x` is float64. Any strides; dense rows are fastest. Each pair has one column:
///   transformers' tables of full width, `cat(freqs, freqs)` of `[.., R]`, are `table.narrow(-1, 0, R / 2)` here. Given
///   whole where R is at most half of D, they would rotate 2 R channels by the wrong angles: no shape tells (see
///   `set_position_check`).
/// @param positions  `[S]` or `[B, S]` (`[T]` for packed `x`), int32 or int64, on the device of `x`. With `pair_axes`
///   there are 1 to 4 axes in front: `[A, S]` or `[A, B, S]` (`[A, T]`). A position outside `[0, P)` gives NaN for
///   its token, or, with `pair_axes`, for the pairs that read it: the host cannot see it without waiting for the
///   device (see `set_position_check`).
/// @param interleaved  false: pairs are channels `(i, i + R/2)` (GPT-NeoX, Llama in Hugging Face's layout);
///   true: `(2i, 2i + 1)` (RoFormer, GPT-J, Llama's own layout).
/// @param conjugate  rotate backwards, which undoes the rotation; the backward pass is this operator with the
///   flag flipped.
/// @param pair_axes  the axis of `positions`, 0 to A - 1, that each of the `R/2` pairs reads, R/2 at most 512: the
///   sections of M-RoPE (Qwen2-VL, Wang et al. 2024, https://arxiv.org/abs/2409.12191, section 2.1) and of 2-D grids.
///   Tables are then looked up by position. Default, empty: all pairs read the one position of their token.
/// @return a new tensor of the shape and dtype of `x`, in its memory layout where that is dense.
/// @throws c10::Error  naming the argument, what was expected and what came, before anything is launched.
///
/// Differentiable with respect to `x`, `cos` and `sin`, any number of times; deterministic.
///
/// Example:
/// ```
/// auto [cos, sin] = posenc::rotary_tables(posenc::rotary_inv_freq(/*rotary_dim=*/128), /*length=*/4096);
/// auto y = posenc::rotary_embedding(x, cos.to(x.device()), sin.to(x.device()));
/// ```
POSENC_API at::Tensor rotary_embedding(
    const at::Tensor& x,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions = std::nullopt,
    bool interleaved = false,
    bool conjugate = false,
    at::IntArrayRef pair_axes = {});

/// Rotates queries and keys of one attention layer in one launch; everything else as `rotary_embedding`.
///
/// @param q,k  `[B, S, Hq, D]` and `[B, S, Hk, D]`, or `[T, Hq, D]` and `[T, Hk, D]`: same dtype, device and
///   sizes but for the number of heads.
/// @return the rotated pair `(q', k')`.
///
/// Example:
/// ```
/// auto [q_rotated, k_rotated] = posenc::rotary_embedding_qk(q, k, cos, sin);
/// ```
POSENC_API std::tuple<at::Tensor, at::Tensor> rotary_embedding_qk(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions = std::nullopt,
    bool interleaved = false,
    bool conjugate = false,
    at::IntArrayRef pair_axes = {});

/// `rotary_embedding` in place: `x` becomes the rotated tensor.
///
/// Differentiable with respect to `x`, any number of times, and nothing of `x` is saved. Values of `x` that other
/// operators saved for their backward pass are stale, and autograd says so.
///
/// @return `x`. As a dispatcher operator it returns nothing, which is what `torch.compile` needs.
/// @throws c10::Error  as `rotary_embedding`; also where `x` is a leaf that requires grad, where `cos` or `sin`
///   requires grad (its gradient needs the input, which is gone), where two elements of `x` are the same memory, and
///   where it overlaps the tables or positions.
///
/// Example:
/// ```
/// posenc::rotary_embedding_(x, cos, sin);
/// ```
POSENC_API at::Tensor& rotary_embedding_(
    at::Tensor& x,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions = std::nullopt,
    bool interleaved = false,
    bool conjugate = false,
    at::IntArrayRef pair_axes = {});

/// `rotary_embedding_qk` in place, in one launch; everything else as `rotary_embedding_`. `q` and `k` may be slices of
/// one packed projection, but must not overlap. As such views, they are one launch each in the backward pass, as
/// autograd keeps the history of every view by itself.
///
/// @return `(q, k)`.
///
/// Example:
/// ```
/// auto q = qkv.narrow(-2, 0, num_q_heads);  // of [B, S, Hq + 2 Hk, D]
/// auto k = qkv.narrow(-2, num_q_heads, num_kv_heads);
/// posenc::rotary_embedding_qk_(q, k, cos, sin);
/// ```
POSENC_API std::tuple<at::Tensor&, at::Tensor&> rotary_embedding_qk_(
    at::Tensor& q,
    at::Tensor& k,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions = std::nullopt,
    bool interleaved = false,
    bool conjugate = false,
    at::IntArrayRef pair_axes = {});

/// Splits a packed projection into rotated queries, rotated keys and values, in one launch that reads it once.
///
/// @param qkv  `[B, S, (Hq + 2 Hk) D]` or `[T, (Hq + 2 Hk) D]`: all heads of q, then those of k, then those of v, as
///   one linear layer gives them. Or `[B, S, 3, H, D]` or `[T, 3, H, D]` with `Hq = Hk = H`. Any strides; dtypes as in
///   `rotary_embedding`.
/// @param num_q_heads,num_kv_heads  Hq and Hk, at least 1; the head size D follows from the sizes.
/// @param cos,sin,positions,interleaved,conjugate,pair_axes  as in `rotary_embedding`.
/// @return `(q', k', v)`: new contiguous tensors `[B, S, Hq, D]` and twice `[B, S, Hk, D]`, or without B, `[T, ..]`.
///   v is a copy: an operator may not return a view of its input to `torch.compile`, and attention wants it dense.
/// @throws c10::Error  as `rotary_embedding`; also where the sizes of `qkv` do not go with the numbers of heads.
///
/// Differentiable with respect to `qkv`, `cos` and `sin`, any number of times; the gradient to `qkv` is written by one
/// launch of `rotary_embedding_pack`, without a concatenation.
///
/// Example:
/// ```
/// auto [q, k, v] = posenc::rotary_embedding_qkv(linear(x), /*num_q_heads=*/32, /*num_kv_heads=*/8, cos, sin);
/// ```
POSENC_API std::tuple<at::Tensor, at::Tensor, at::Tensor> rotary_embedding_qkv(
    const at::Tensor& qkv,
    int64_t num_q_heads,
    int64_t num_kv_heads,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions = std::nullopt,
    bool interleaved = false,
    bool conjugate = false,
    at::IntArrayRef pair_axes = {});

/// Rotates queries and keys and writes them, and the values as they are, into one packed tensor: with `conjugate`
/// flipped it undoes `rotary_embedding_qkv` and is its backward pass, as that is the backward pass of this.
///
/// @param q,k,v  `[B, S, Hq, D]`, and twice `[B, S, Hk, D]`; or without B, `[T, ..]`. Any strides.
/// @param stacked  the result is `[B, S, 3, H, D]` or `[T, 3, H, D]`, which needs `Hq = Hk`. Default: false,
///   `[B, S, (Hq + 2 Hk) D]` or `[T, (Hq + 2 Hk) D]`.
/// @param cos,sin,positions,interleaved,conjugate,pair_axes  as in `rotary_embedding`.
/// @return a new contiguous tensor.
///
/// Differentiable with respect to `q`, `k`, `v`, `cos` and `sin`, any number of times.
///
/// Example:
/// ```
/// auto grad_qkv = posenc::rotary_embedding_pack(
///     grad_q, grad_k, grad_v, cos, sin, std::nullopt, /*stacked=*/false, /*interleaved=*/false, /*conjugate=*/true);
/// ```
POSENC_API at::Tensor rotary_embedding_pack(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions = std::nullopt,
    bool stacked = false,
    bool interleaved = false,
    bool conjugate = false,
    at::IntArrayRef pair_axes = {});

/// Turns the check of `positions` against the tables on or off (default off; on at start when the environment
/// variable `POSENC_CHECK_POSITIONS` is set to something other than 0). While it is on, a position outside
/// the tables is an error instead of NaN, and so are tables whose left and right halves are equal, as those of
/// transformers are (`cat(freqs, freqs)`); not where `pair_axes` are given, as tables of grids may be like that. The
/// price is waiting for the device in every call.
POSENC_API void set_position_check(bool enabled);

/// Whether positions are checked; see `set_position_check`.
POSENC_API bool position_check();

}  // namespace posenc
