#pragma once

#include <blockwise/padded.h>

#include <ATen/core/Tensor.h>

namespace posenc::blockwise {

/// Computes `alibi_attention_slope_sums`, float64 `[4, B, Hq, Sq]`, in blocks of query rows.
at::Tensor blockwise_slope_sums(const Padded& call, const at::Tensor& grad_out, const at::Tensor& lse);

}  // namespace posenc::blockwise
