#pragma once

#include <arguments/alibi_problem.h>
#include <arguments/rotary_problem.h>

#include <cstdint>

// Tests whether a call allows a vector width. No torch.
namespace posenc::cuda {

/// Bytes of the widest load and store of a thread.
constexpr int kMaxVectorBytes = 16;

/// Entries of a table that one load fetches if `Entries` contiguous ones are needed.
template <typename Real, int Entries>
constexpr int kTableVector =
    Entries * static_cast<int>(sizeof(Real)) <= kMaxVectorBytes ? Entries
                                                                : kMaxVectorBytes / static_cast<int>(sizeof(Real));

inline bool is_aligned(const void* data, int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(bytes) == 0;
}

/// Whether the tensor can be accessed in vectors of V elements: dense channels, all other strides multiples of V, and
/// an aligned address.
template <typename T, int V>
bool holds_vectors(const void* data, const Strides& strides) {
  return strides.channel == 1 && is_aligned(data, V * sizeof(T)) && strides.batch % V == 0 && strides.seq % V == 0 &&
      strides.head % V == 0;
}

/// The same for scores, whose rows have `k_len` elements.
template <typename T, int V>
bool holds_vectors(const void* data, const ScoreStrides& strides, int32_t k_len) {
  return k_len % V == 0 && strides.key == 1 && is_aligned(data, V * sizeof(T)) && strides.batch % V == 0 &&
      strides.head % V == 0 && strides.query % V == 0;
}

template <typename Real, int Entries>
bool table_loads_vectors(const RotaryTable& table) {
  constexpr int kStep = kTableVector<Real, Entries>;
  return table.stride_pair == 1 && is_aligned(table.data, kStep * sizeof(Real)) && table.stride_batch % kStep == 0 &&
      table.stride_row % kStep == 0;
}

/// Whether `rotary_dim / 2` and the length of the tail are multiples of `v` channels.
inline bool divides(int v, int64_t num_pairs, int64_t head_dim) {
  return num_pairs % v == 0 && (head_dim - 2 * num_pairs) % v == 0;
}

/// The number of chunks of two vectors of `v` channels in a head: those that rotate, then those of the tail.
inline int64_t num_chunks(int v, int64_t num_pairs, int64_t head_dim) {
  return num_pairs / v + ((head_dim - 2 * num_pairs) / v + 1) / 2;
}

}  // namespace posenc::cuda
