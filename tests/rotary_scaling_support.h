#pragma once

#include "support.h"

#include <posenc/frequencies.h>

/// Shared by the tests of scalings.
namespace posenc::test {

inline YarnScaling yarn(double factor, int64_t original) {
  YarnScaling scaling;
  scaling.factor = factor;
  scaling.original_max_position_embeddings = original;
  return scaling;
}

/// Factor lists of 48 pairs, as in tests/data/frequencies.py.
inline LongRopeScaling phi3() {
  LongRopeScaling scaling;
  for (int i = 0; i < 48; ++i) {
    scaling.short_factor.push_back(1 + i / 32.0);
    scaling.long_factor.push_back(1 + i * i / 32.0);
  }
  scaling.original_max_position_embeddings = 4096;
  scaling.max_position_embeddings = 131072;
  return scaling;
}

}  // namespace posenc::test
