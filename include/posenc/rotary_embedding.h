#pragma once

#include <posenc/export.h>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <optional>
#include <tuple>

/// Rotary position embedding (RoFormer, Su et al. 2021, https://arxiv.org/abs/2104.09864, eq. 34) as
/// dispatcher operators: `posenc::rotary_embedding` and `rotary_embedding_qk`, both also in place, and
/// `rotary_embedding_qkv` and `rotary_embedding_pack` for packed projections. They have kernels for CPU, CUDA and Meta,
/// and derivatives of any order.
namespace posenc {

/// Rotates the first `R = 2 * cos.size(-1)` channels of each head of `x` by the angles of its token.
///
/// For each pair `(x1, x2)` of channels, with cos and sin from the table row of the token,
///
///     y1 = x1 cos - x2 sin,    y2 = x1 sin + x2 cos.
///
/// Channels `R` to `D - 1` are copied. float16 and bfloat16 are computed in float32 and rounded once.
///
/// NaN and infinity spread only as these equations say. One in `x` affects its own pair in one head of one token. One
/// in a table affects its pair in all tokens that read the row. The same holds for gradients of `x`. In gradients of
/// the tables, a NaN in `x` or in the gradient of the output affects its pair in the row that its token read.
///
/// @param x  `[B, S, H, D]`, or `[T, H, D]` for packed sequences: float16, bfloat16, float32 or float64, any
///   strides (also 0) without a copy. Other layouts are views of these, made with `transpose`.
/// @param cos,sin  `[P, R/2]`: looked up by position, or row s for token s without `positions` (`P >= S`). Or
///   `[B, S, R/2]` (B may be 1), one row for each token, for `x` of four dimensions and without `positions`.
///   float32, or float64 if `x` is float64. Any strides; dense rows are fastest. There is one column for each pair. Of
///   the full-width tables of transformers, `cat(freqs, freqs)` of `[.., R]`, pass `table.narrow(-1, 0, R / 2)`. If R
///   is at most D/2, a full-width table passes the checks of shapes and rotates 2 R channels by wrong angles (see
///   `set_position_check`).
/// @param positions  `[S]` or `[B, S]` (`[T]` for packed `x`), int32 or int64, on the device of `x`. With `pair_axes`
///   a dimension of 1 to 4 axes comes first: `[A, S]` or `[A, B, S]` (`[A, T]`). A position outside `[0, P)` gives NaN
///   for its token or, with `pair_axes`, for the pairs that read it. It is not an error because the host would have to
///   wait for the device to see it (see `set_position_check`).
/// @param interleaved  false: pairs are channels `(i, i + R/2)` (GPT-NeoX, Llama in Hugging Face's layout);
///   true: `(2i, 2i + 1)` (RoFormer, GPT-J, Llama's own layout).
/// @param conjugate  rotate by the negative angles, which undoes the rotation. The backward pass is this operator with
///   the flag flipped.
/// @param pair_axes  the axis of `positions`, 0 to A - 1, that each of the `R/2` pairs reads, for the sections of
///   M-RoPE (Qwen2-VL, Wang et al. 2024, https://arxiv.org/abs/2409.12191, section 2.1) and for 2-D grids. R/2 is at
///   most 512, and tables are `[P, R/2]`. Default: empty, all pairs read the one position of their token.
/// @return a new tensor of the shape and dtype of `x`, in its memory layout if that is dense.
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
/// @param q,k  `[B, S, Hq, D]` and `[B, S, Hk, D]`, or `[T, Hq, D]` and `[T, Hk, D]`, of the same dtype and device.
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

/// `rotary_embedding` in place: `x` is overwritten by the rotated tensor.
///
/// Differentiable with respect to `x`, any number of times; `x` is not saved. If another operator saved `x` before,
/// autograd raises an error in the backward pass of that operator.
///
/// @return `x`. The dispatcher operator returns nothing, because `torch.compile` requires that.
/// @throws c10::Error  as `rotary_embedding`; also if `x` is a leaf that requires grad, if `cos` or `sin` requires grad
///   (its gradient needs the input, which is overwritten), if two elements of `x` share memory, or if `x` overlaps the
///   tables or positions.
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
/// one packed projection, but must not overlap. If one of them is a view, the backward pass launches a kernel for each,
/// because autograd updates the history of a view by a node with one output.
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

/// Splits a packed projection into rotated queries, rotated keys and values, in one launch that reads `qkv` once.
///
/// @param qkv  `[B, S, (Hq + 2 Hk) D]` or `[T, (Hq + 2 Hk) D]`: all heads of q, then of k, then of v, as returned by
///   one linear layer. Or `[B, S, 3, H, D]` or `[T, 3, H, D]` with `Hq = Hk = H`. Any strides; dtypes as in
///   `rotary_embedding`.
/// @param num_q_heads,num_kv_heads  Hq and Hk, at least 1. The head size D follows from them and the shape of `qkv`.
/// @param cos,sin,positions,interleaved,conjugate,pair_axes  as in `rotary_embedding`.
/// @return `(q', k', v)`: new contiguous tensors `[B, S, Hq, D]`, `[B, S, Hk, D]` and `[B, S, Hk, D]`, or `[T, ..]`. v
///   is a dense copy for attention. Under `torch.compile` an operator must not return a view of its input.
/// @throws c10::Error  as `rotary_embedding`; also if the shape of `qkv` does not match the numbers of heads.
///
/// Differentiable with respect to `qkv`, `cos` and `sin`, any number of times. The gradient of `qkv` is written by one
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

/// Rotates queries and keys and writes them and the unchanged values into one packed tensor. With `conjugate` flipped,
/// it is the inverse and the backward pass of `rotary_embedding_qkv`, and `rotary_embedding_qkv` is its backward pass.
///
/// @param q,k,v  `[B, S, Hq, D]`, `[B, S, Hk, D]` and `[B, S, Hk, D]`, or `[T, ..]`. Any strides.
/// @param stacked  true: the result is `[B, S, 3, H, D]` or `[T, 3, H, D]`, which requires `Hq = Hk = H`. Default:
///   false, `[B, S, (Hq + 2 Hk) D]` or `[T, (Hq + 2 Hk) D]`.
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

/// Turns the check of `positions` and tables on or off. Default: off, or on if the environment variable
/// `POSENC_CHECK_POSITIONS` has a value other than 0. While it is on, a position outside the tables is an error instead
/// of NaN. Full-width tables of transformers (`cat(freqs, freqs)`), whose left and right halves are equal, are an error
/// too, except with `pair_axes`, since tables of grids may have equal halves. Every call then waits for the device.
POSENC_API void set_position_check(bool enabled);

/// Whether the check of `set_position_check` is on.
POSENC_API bool position_check();

}  // namespace posenc
