#pragma once

#include "support.h"

#include <posenc/rotary_embedding.h>

/// Shared by the tests of the rotation in place.
namespace posenc::test {

inline void rotate_in_place(const RotaryInputs& in, at::Tensor& x) {
  posenc::rotary_embedding_(x, in.cos, in.sin, in.positions, in.interleaved, in.conjugate, in.pair_axes);
}

inline void rotate_in_place(const RotaryInputs& in, at::Tensor& q, at::Tensor& k) {
  posenc::rotary_embedding_qk_(q, k, in.cos, in.sin, in.positions, in.interleaved, in.conjugate, in.pair_axes);
}

}  // namespace posenc::test
