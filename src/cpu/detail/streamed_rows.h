#pragma once

#include <arguments/alibi_problem.h>
#include <cpu/detail/score_rows.h>
#include <cpu/detail/stream.h>

#include <algorithm>
#include <cstdint>

// Rows of scores that are written with stores that bypass the caches.
namespace posenc::cpu {

/// Whether to write an output with these stores: large, aligned, with dense keys, and not of 16 bits, because float16
/// and bfloat16 take longer to convert than to write.
template <typename T>
bool is_streamed(const AlibiShape& shape, const ScoresOut& out) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(T));
  const auto is_aligned = [](int64_t elements) { return elements * kSize % kStreamAlignment == 0; };
  const bool aligned = is_aligned(shape.k_len) && is_aligned(out.strides.batch) && is_aligned(out.strides.head) &&
      is_aligned(out.strides.query) && reinterpret_cast<std::uintptr_t>(out.data) % kStreamAlignment == 0;
  const int64_t elements = shape.batch * shape.num_heads * shape.q_len * shape.k_len;
  return kStreams && kSize >= 4 && elements * kSize >= kStreamedBytes && aligned && out.strides.key == 1;
}

/// Writes all rows of such an output in blocks. `fill(row, begin, seen, count, block)` computes `count` keys from
/// `begin` on; the query sees the first `seen` of them.
template <typename T, typename Fill>
void stream_rows(const AlibiShape& shape, const ScoresOut& out, const Fill& fill) {
  const auto body = [&](const ScoreRow& row) {
    constexpr int32_t kBlock = 4096 / sizeof(T);
    alignas(kStreamAlignment) T block[kBlock];
    T* data = static_cast<T*>(out.data) + out.strides.row(row.batch, row.head, row.query);
    const int32_t visible = shape.visible(shape.position(row.query));
    int32_t count = 0;
    for (int32_t begin = 0; begin < shape.k_len; begin += count) {
      count = std::min(shape.k_len - begin, kBlock);
      fill(row, begin, std::min(std::max(visible - begin, 0), count), count, block);
      stream(block, data + begin, count * static_cast<int64_t>(sizeof(T)));
    }
  };
  for_each_row(shape, /*head_first=*/false, body, finish_streaming);
}

}  // namespace posenc::cpu
