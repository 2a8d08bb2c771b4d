#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <tuple>

namespace posenc {

/// `rotary_tables` with a length that may be a symbol: what the dispatcher calls.
std::tuple<at::Tensor, at::Tensor> rotary_tables_symint(
    const at::Tensor& inv_freq,
    c10::SymInt length,
    at::ScalarType dtype,
    double attention_factor);

/// The gradient of `rotary_tables` with respect to `inv_freq`:
///
///     dinv_freq_i = sum over p of p (cos dsin - sin dcos) of row p and pair i,
///
/// where `cos` and `sin` are the tables, which contain the attention factor. Summed in float64; deterministic.
///
/// @param grad_cos,grad_sin,cos,sin  `[P, R/2]`, float32 or float64, any strides.
/// @param dtype  of the result, that of `inv_freq`: float32 or float64.
/// @return `[R/2]`.
at::Tensor rotary_tables_backward(
    const at::Tensor& grad_cos,
    const at::Tensor& grad_sin,
    const at::Tensor& cos,
    const at::Tensor& sin,
    at::ScalarType dtype);

}  // namespace posenc
