#pragma once

#include "support.h"

#include <ATen/ATen.h>

#include <vector>

/// Shared by the tests of positions.
namespace posenc::test {

using Ids = std::vector<int64_t>;

/// The parameter is the device and the dtype of positions.
class Positions : public TargetTest {
 protected:
  at::Tensor tensor(const Ids& values) const { return at::tensor(values, at::kLong).to(dtype()).to(device()); }

  /// `rows` as a tensor `[rows.size(), length]`.
  at::Tensor matrix(const std::vector<Ids>& rows) const {
    std::vector<at::Tensor> tensors;
    tensors.reserve(rows.size());
    for (const Ids& row : rows) {
      tensors.push_back(tensor(row));
    }
    return at::stack(tensors);
  }

  void expect_ids(const at::Tensor& actual, const at::Tensor& expected) const {
    EXPECT_EQ(actual.device().type(), device().type());
    expect_same_bits(actual, expected);
  }
};

inline std::vector<Target> position_targets(at::DeviceType device) {
  return {{device, at::kInt}, {device, at::kLong}};
}

/// Ids of tokens: text, and the defaults of `MropeOptions` for images and videos.
inline constexpr int64_t kText = 11;
inline constexpr int64_t kImage = 151655;
inline constexpr int64_t kVideo = 151656;

}  // namespace posenc::test
