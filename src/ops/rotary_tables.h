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

}  // namespace posenc
