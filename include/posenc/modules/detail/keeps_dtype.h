#pragma once

#include <torch/nn/cloneable.h>
#include <torch/types.h>

namespace posenc::detail {

/// A module whose parameters keep their dtype: `to` moves them to a device and ignores the dtype. Slopes and
/// frequencies are multiplied by positions, so the 8 bits of bfloat16 would give large errors.
template <typename Derived>
class KeepsDtype : public torch::nn::Cloneable<Derived> {
 public:
  void to(torch::Device device, torch::Dtype /*dtype*/, bool non_blocking = false) override {
    torch::nn::Module::to(device, non_blocking);
  }
  void to(torch::Dtype /*dtype*/, bool /*non_blocking*/ = false) override {}
  void to(torch::Device device, bool non_blocking = false) override { torch::nn::Module::to(device, non_blocking); }
};

}  // namespace posenc::detail
