#pragma once

#include <blockwise/padded.h>

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace posenc::cpu {

/// Up to this number of queries keys and values are read where they are: packing takes longer than their products.
constexpr int64_t kFewQueries = 4;

/// `attention` of few queries, as in decoding. The query heads of a key head share its keys, and the keys are divided
/// into parts, whose results are merged. The number of parts does not depend on the number of threads.
/// @param out, lse  the results, as in `attention`; not empty
void attention_of_few_queries(const blockwise::Padded& call, const at::Tensor& out, const at::Tensor& lse);

}  // namespace posenc::cpu
