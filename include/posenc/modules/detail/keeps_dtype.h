#pragma once

#include <torch/nn/cloneable.h>
#include <torch/types.h>

namespace posenc::detail {

/// A module whose parameters keep their dtype when a model is converted: they are moved to a device and nothing else.
/// Slopes and frequencies are multiplied with positions, and bfloat16 holds them with 8 bits.
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
