#pragma once

#include <posenc/export.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

/// Inverse frequencies of rotary embeddings and the tables that the operators read.
namespace posenc {

/// `base^(-2i/R)` for `i = 0 .. R/2 - 1` (RoFormer, Su et al. 2021, section 3.2.2).
///
/// @param rotary_dim  R: positive and even.
/// @param base  positive; 10000 in the paper, `rope_theta` in model configurations.
/// @return float64 `[R/2]` on the CPU.
POSENC_API at::Tensor rotary_inv_freq(int64_t rotary_dim, double base = 10000.0);

/// The dtype of the tables that go with tensors of `dtype`: float64 for float64, float32 for all others.
POSENC_API at::ScalarType rotary_table_dtype(at::ScalarType dtype);

/// Cosines and sines of `position * inv_freq` for positions 0 to `length - 1`.
///
/// Angles are formed in float64 whatever the dtype of the result: a float32 angle is already wrong by
/// 0.03 rad at position 1,000,000, and a bfloat16 one beyond position 256.
///
/// An operator of the dispatcher, `posenc::rotary_tables`, differentiable with respect to `inv_freq`, any number of
/// times; deterministic. On a GPU it is one launch. The last bit of an entry may differ between devices: tables that must
/// not are built on the CPU and copied.
///
/// @param inv_freq  float32 or float64 `[R/2]`.
/// @param length  number of rows, not negative.
/// @param dtype  float32 or float64; see `rotary_table_dtype`.
/// @param attention_factor  what both tables are multiplied with, positive and finite; see `RotaryFrequencies`.
/// @return `(cos, sin)`, each `[length, R/2]` on the device of `inv_freq`.
/// @throws c10::Error  naming the argument, what was expected and what came, before anything is launched.
///
/// Example:
/// ```
/// auto [cos, sin] = posenc::rotary_tables(posenc::rotary_inv_freq(128, 500000.0), 8192);
/// ```
POSENC_API std::tuple<at::Tensor, at::Tensor> rotary_tables(
    const at::Tensor& inv_freq,
    int64_t length,
    at::ScalarType dtype = at::kFloat,
    double attention_factor = 1.0);

}  // namespace posenc
