#pragma once

#include "support.h"

#include <posenc/frequencies.h>

#include <ATen/ATen.h>

/// Shared by the tests of rotary_embedding and qk_norm_rotary_embedding.
namespace posenc::test {

/// Fixture of tests that run with every dtype.
class RotaryEmbedding : public TargetTest {
 protected:
  /// Arguments with cos and sin of positions 0 to 63, as a model has them.
  RotaryInputs model_inputs(const RotaryCase& c) const {
    RotaryInputs in = make_inputs(c, GetParam());
    const auto [cos, sin] = posenc::rotary_tables(posenc::rotary_inv_freq(c.rotary_dim), 64, table_dtype(dtype()));
    in.cos = cos.to(device());
    in.sin = sin.to(device());
    return in;
  }

  at::Tensor positions(const std::vector<int64_t>& values) const { return at::tensor(values, at::kLong).to(device()); }
};

/// A call in a grid of tests: dtype and device, the case, and whether pairs are interleaved.
using RotaryGridParam = std::tuple<Target, RotaryCase, bool>;

inline std::string rotary_grid_name(const ::testing::TestParamInfo<RotaryGridParam>& info) {
  return std::string(at::toString(std::get<0>(info.param).dtype)) + (std::get<2>(info.param) ? "Interleaved" : "Half") +
      "Pairing" + std::get<1>(info.param).name;
}

}  // namespace posenc::test
