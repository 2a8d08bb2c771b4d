#pragma once

#include "support.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <functional>
#include <vector>

/// Comparison of autograd with central differences: torch.autograd.gradcheck, which LibTorch lacks.
namespace posenc::test {

using TensorList = std::vector<at::Tensor>;

/// A function of float64 tensors with any number of results, which are all differentiated.
using Differentiable = std::function<TensorList(const TensorList&)>;

/// Gradients of `sum(outputs * cotangents)` for each input: zeros if no output depends on it, undefined if it does not
/// require grad.
inline TensorList gradients(
    const TensorList& outputs,
    const TensorList& inputs,
    const TensorList& cotangents,
    bool create_graph = false) {
  TensorList differentiated;
  for (const at::Tensor& input : inputs) {
    if (input.requires_grad()) {
      differentiated.push_back(input);
    }
  }
  const TensorList found = torch::autograd::grad(
      outputs, differentiated, cotangents, /*retain_graph=*/true, create_graph, /*allow_unused=*/true);
  TensorList result(inputs.size());
  size_t next = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].requires_grad()) {
      const at::Tensor& gradient = found[next++];
      result[i] = gradient.defined() ? gradient : at::zeros_like(inputs[i]);
    }
  }
  return result;
}

inline TensorList random_like(const TensorList& tensors) {
  TensorList result;
  for (const at::Tensor& tensor : tensors) {
    result.push_back(at::randn(tensor.sizes(), at::kDouble).to(tensor.options()));
  }
  return result;
}

/// Step of the central differences, and the tolerance relative to one plus the absolute value of the derivative.
struct Differences {
  double step;
  double tolerance;
  /// Five-point instead of three-point formula, for functions whose third derivative is not zero.
  bool five_points;
};

/// For functions that are linear in each single element, like a rotation and its gradients. The truncation error is
/// zero for any step. A large step keeps the rounding error, about 1e-16 * |sum| / step, small.
constexpr Differences kMultilinear{0x1p-7, 1e-10, false};

/// For smooth functions: the truncation error of five points is step^4 / 30, here 2e-15, times the fifth derivative.
constexpr Differences kSmooth{0x1p-11, 1e-8, true};

/// Expects autograd and central differences to agree on the gradients of `function` for the `inputs` that require grad.
/// Compares the product of a random cotangent with every column of the Jacobian. Inputs are float64, or narrower if
/// adding the step to their elements is exact; gradients are then compared with the precision of their dtype.
inline void gradcheck(
    const Differentiable& function,
    const TensorList& inputs,
    const Differences& differences = kMultilinear) {
  const TensorList outputs = function(inputs);
  const TensorList cotangents = random_like(outputs);
  const TensorList analytic = gradients(outputs, inputs, cotangents);
  const auto contracted = [&](const TensorList& at_point) {
    const at::NoGradGuard no_grad;
    const TensorList values = function(at_point);
    double sum = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      sum += inner_product(values[i], cotangents[i]);
    }
    return sum;
  };
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!inputs[i].requires_grad()) {
      continue;
    }
    TensorList moved = inputs;
    for (at::Tensor& tensor : moved) {
      tensor = tensor.detach();
    }
    moved[i] = inputs[i].detach().clone(at::MemoryFormat::Contiguous);
    const at::Tensor flat = moved[i].view({-1});
    const at::Tensor expected = at::empty({flat.numel()}, at::kDouble);
    for (int64_t j = 0; j < flat.numel(); ++j) {
      const at::Tensor element = flat[j];
      const double value = element.item<double>();
      const auto moved_by = [&](double steps) {
        element.fill_(value + steps * differences.step);
        return contracted(moved);
      };
      const double three_points = (moved_by(1) - moved_by(-1)) / 2;
      const double derivative =
          differences.five_points ? (8 * three_points - (moved_by(2) - moved_by(-2)) / 2) / 6 : three_points;
      element.fill_(value);
      expected[j].fill_(derivative / differences.step);
    }
    SCOPED_TRACE(::testing::Message() << "gradient of input " << i);
    const at::Tensor shaped = expected.view(inputs[i].sizes());
    const double rounding = unit_roundoff(analytic[i].scalar_type());
    expect_within(analytic[i], shaped, (shaped.abs() + 1) * differences.tolerance + shaped.abs() * rounding);
  }
}

/// `gradcheck` of the gradients of `function`, as a function of its inputs and of the cotangents.
inline void gradgradcheck(
    const Differentiable& function,
    const TensorList& inputs,
    const Differences& differences = kMultilinear) {
  TensorList all = inputs;
  for (const at::Tensor& cotangent : random_like(function(inputs))) {
    all.push_back(cotangent.detach().requires_grad_());
  }
  const size_t count = inputs.size();
  const Differentiable gradient = [&](const TensorList& arguments) {
    const at::AutoGradMode grad_mode(true);
    TensorList primals;
    for (size_t i = 0; i < count; ++i) {
      primals.push_back(arguments[i]);
      // gradcheck calls this with detached inputs.
      if (inputs[i].requires_grad() && !primals[i].requires_grad()) {
        primals[i] = primals[i].detach().requires_grad_();
      }
    }
    const TensorList cotangents(arguments.begin() + static_cast<std::ptrdiff_t>(count), arguments.end());
    TensorList found = gradients(function(primals), primals, cotangents, /*create_graph=*/true);
    found.erase(
        std::remove_if(found.begin(), found.end(), [](const at::Tensor& tensor) { return !tensor.defined(); }),
        found.end());
    return found;
  };
  gradcheck(gradient, all, differences);
}

}  // namespace posenc::test
