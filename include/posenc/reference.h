#pragma once

#include <posenc/alibi_attention.h>
#include <posenc/export.h>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <optional>
#include <tuple>

/// The operators of this library in plain LibTorch tensor operations, differentiated by LibTorch's autograd. They
/// define what each operator computes, and tests compare the kernels with them. They are not optimised.
namespace posenc::reference {

/// `posenc::rotary_embedding` in tensor operations. `x` is converted to the dtype of the tables, and the result is
/// rounded once.
POSENC_API at::Tensor rotary_embedding(
    const at::Tensor& x,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions = std::nullopt,
    bool interleaved = false,
    bool conjugate = false,
    at::IntArrayRef pair_axes = {});

/// `posenc::rotary_embedding_qk` in tensor operations.
POSENC_API std::tuple<at::Tensor, at::Tensor> rotary_embedding_qk(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions = std::nullopt,
    bool interleaved = false,
    bool conjugate = false,
    at::IntArrayRef pair_axes = {});

/// `posenc::rotary_embedding_qkv` in tensor operations.
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

/// `posenc::rotary_embedding_pack` in tensor operations.
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

/// `posenc::rotary_tables` in tensor operations.
POSENC_API std::tuple<at::Tensor, at::Tensor> rotary_tables(
    const at::Tensor& inv_freq,
    int64_t length,
    at::ScalarType dtype = at::kFloat,
    double attention_factor = 1.0);

/// `posenc::qk_norm_rotary_embedding` in tensor operations, computed in the dtype of the tables and rounded once.
POSENC_API std::tuple<at::Tensor, at::Tensor> qk_norm_rotary_embedding(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& q_weight,
    const at::Tensor& k_weight,
    const at::Tensor& cos,
    const at::Tensor& sin,
    const std::optional<at::Tensor>& positions = std::nullopt,
    double eps = 1e-6,
    bool unit_offset = false,
    bool interleaved = false,
    bool conjugate = false,
    at::IntArrayRef pair_axes = {});

/// `posenc::alibi_bias` in tensor operations.
POSENC_API at::Tensor alibi_bias(
    const at::Tensor& slopes,
    int64_t q_len,
    int64_t k_len,
    bool causal = false,
    at::ScalarType dtype = at::kFloat,
    std::optional<int64_t> query_offset = std::nullopt);

/// `posenc::alibi_add` in tensor operations. The sum is computed in float32 (float64 for float64) and rounded once.
POSENC_API at::Tensor alibi_add(
    const at::Tensor& scores,
    const at::Tensor& slopes,
    bool causal = false,
    std::optional<int64_t> query_offset = std::nullopt);

/// `posenc::alibi_softmax` in tensor operations.
POSENC_API at::Tensor alibi_softmax(
    const at::Tensor& scores,
    const at::Tensor& slopes,
    double scale = 1.0,
    bool causal = false,
    const std::optional<at::Tensor>& key_padding_mask = std::nullopt,
    std::optional<int64_t> query_offset = std::nullopt);

/// `posenc::attention_with_lse` in tensor operations. It stores the scores. For packed sequences the host reads
/// `cu_seqlens`, which waits for the device.
POSENC_API std::tuple<at::Tensor, at::Tensor> attention(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const AttentionOptions& options = {});

/// `posenc::reference::attention` with these slopes.
POSENC_API std::tuple<at::Tensor, at::Tensor> alibi_attention(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const at::Tensor& slopes,
    const ALiBiAttentionOptions& options = {});

}  // namespace posenc::reference
