#pragma once

#include <arguments/rotary_embedding.h>

#include <ATen/core/Tensor.h>

#include <tuple>
#include <utility>

namespace posenc::arguments {

/// Refuses numbers of heads below 1.
void check_head_counts(const char* op, int64_t num_q_heads, int64_t num_kv_heads);

/// q, k and v of a packed projection as views.
struct PackedViews {
  at::Tensor q, k, v;
};

/// The views of `packed`, `[B, S, (Hq + 2Hk) D]`, `[T, (Hq + 2Hk) D]`, `[B, S, 3, H, D]` or `[T, 3, H, D]`.
/// @throws c10::Error  if its sizes do not match the numbers of heads.
PackedViews packed_views(
    const char* op,
    const char* name,
    const at::Tensor& packed,
    int64_t num_q_heads,
    int64_t num_kv_heads);

/// Whether a packed projection with `dims` dimensions is `[.., 3, H, D]`.
inline bool is_stacked(int64_t dims) {
  return dims >= 4;
}

/// The checks of `rotary_embedding_pack`.
void check_rotary_pack(const char* op, const PackRotation& rotation, const PackedViews& from);

/// A checked call of `rotary_embedding_qkv`; `to` are its outputs.
struct RotaryQkvCall {
  RotaryProblem problem;
  PackedViews to;
};
RotaryQkvCall rotary_qkv_call(const char* op, const Rotation& rotation, const PackedViews& from);

/// A checked call of `rotary_embedding_pack`; `packed` is its output.
struct RotaryPackCall {
  RotaryProblem problem;
  at::Tensor packed;
};
RotaryPackCall rotary_pack_call(const char* op, const PackRotation& rotation, const PackedViews& from);

// The operators for one dispatch key. Each checks its arguments, allocates its outputs and runs the kernel.

template <RotaryKernel kKernel>
std::tuple<at::Tensor, at::Tensor, at::Tensor> rotary_embedding_qkv(
    const Rotation& rotation,
    const at::Tensor& qkv,
    int64_t num_q_heads,
    int64_t num_kv_heads) {
  constexpr const char* kOp = "posenc::rotary_embedding_qkv";
  RotaryQkvCall call = rotary_qkv_call(kOp, rotation, packed_views(kOp, "qkv", qkv, num_q_heads, num_kv_heads));
  kKernel(call.problem, qkv);
  return {std::move(call.to.q), std::move(call.to.k), std::move(call.to.v)};
}

template <RotaryKernel kKernel>
at::Tensor rotary_embedding_pack(
    const PackRotation& rotation,
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v) {
  RotaryPackCall call = rotary_pack_call("posenc::rotary_embedding_pack", rotation, {q, k, v});
  kKernel(call.problem, q);
  return std::move(call.packed);
}

}  // namespace posenc::arguments
