#pragma once

#include "support.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <functional>
#include <vector>

/// Autograd held against central differences, which Python has as torch.autograd.gradcheck and C++ has not.
namespace posenc::test {

using TensorList = std::vector<at::Tensor>;

/// A function of float64 tensors. Its results may be in any number and are all differentiated.
using Differentiable = std::function<TensorList(const TensorList&)>;

/// Gradients of `sum(outputs * cotangents)` with respect to the inputs that require one, zeros where an input has no
/// part in the outputs; undefined for the other inputs.
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

/// Expects the gradients of `function` at `inputs`, float64 tensors of which some require grad, to be those of central
/// differences. All columns of the Jacobian are compared, contracted with a random cotangent.
inline void gradcheck(const Differentiable& function, const TensorList& inputs) {
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
    // A rotation and its gradients are linear in each single element, so the truncation error is zero for any step;
    // a large one keeps the rounding error, about 1e-16 * |sum| / step, small.
    constexpr double step = 0x1p-7;
    constexpr double tolerance = 1e-10;
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
      element.fill_(value + step);
      const double above = contracted(moved);
      element.fill_(value - step);
      const double below = contracted(moved);
      element.fill_(value);
      expected[j].fill_((above - below) / (2 * step));
    }
    SCOPED_TRACE(::testing::Message() << "gradient of input " << i);
    expect_within(
        analytic[i], expected.view(inputs[i].sizes()), (expected.view(inputs[i].sizes()).abs() + 1) * tolerance);
  }
}

/// As `gradcheck`, of the gradients of `function`: as a function of its inputs and of the cotangents.
inline void gradgradcheck(const Differentiable& function, const TensorList& inputs) {
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
      // The points that central differences move to have lost the flag.
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
  gradcheck(gradient, all);
}

}  // namespace posenc::test
