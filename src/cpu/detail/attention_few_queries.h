#pragma once

#include <blockwise/padded.h>

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace posenc::cpu {

/// The largest number of queries, Sq, that `attention_of_few_queries` computes. The path for more queries first copies
/// k and v, `[B, Sk, Hk, D]`, to panels in which a vector has one channel of several keys, which does not pay for so
/// few rows: Sq 4, Sk 4,096, 8 heads of 64 channels take 2.7 ms here and took 16 ms there (float32, one thread, AVX2).
constexpr int64_t kFewQueries = 4;

/// `attention` of few queries, as in decoding. The query heads of a key head share its keys, and the keys are divided
/// into parts, whose results are merged. The number of parts does not depend on the number of threads.
/// @param out, lse  the results, as in `attention`; not empty
void attention_of_few_queries(const blockwise::Padded& call, const at::Tensor& out, const at::Tensor& lse);

}  // namespace posenc::cpu
