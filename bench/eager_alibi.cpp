#include "eager_alibi.h"

#include <ATen/ATen.h>

#include <limits>
#include <utility>

namespace posenc::bench {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

at::TensorOptions float_options(const EagerAlibiOptions& options) {
  return at::TensorOptions(at::kFloat).device(options.device);
}

/// `j - i`, `[S, S]`.
at::Tensor relative_positions(const EagerAlibiOptions& options) {
  const at::Tensor positions = at::arange(options.sequence, float_options(options));
  return positions.unsqueeze(0) - positions.unsqueeze(1);
}

/// A bias from what stands for the distances, float32 and cast at the end.
EagerBias scaled(at::ScalarType dtype, at::Tensor distances) {
  return [dtype, distances = std::move(distances)](const at::Tensor& slopes) {
    return (slopes.view({-1, 1, 1}) * distances).to(dtype);
  };
}

// The distances are made in each call, as in a module without buffers.
EagerBias make_abs(const EagerAlibiOptions& options) {
  return [options](const at::Tensor& slopes) {
    return scaled(options.dtype, relative_positions(options).abs().neg())(slopes);
  };
}

// -|j - i| is a buffer `[S, S]` of the model.
EagerBias make_stored_distances(const EagerAlibiOptions& options) {
  return scaled(options.dtype, relative_positions(options).abs().neg());
}

// The same in the dtype of the model, as after model.to(bfloat16): fast, and wrong beyond 256 tokens.
EagerBias make_stored_in_dtype(const EagerAlibiOptions& options) {
  return [dtype = options.dtype, distances = relative_positions(options).abs().neg().to(options.dtype)](
             const at::Tensor& slopes) { return slopes.to(dtype).view({-1, 1, 1}) * distances; };
}

// For models that only look back: -relu(i - j).
EagerBias make_stored_relu(const EagerAlibiOptions& options) {
  return scaled(options.dtype, relative_positions(options).neg().relu().neg());
}

/// Minus infinity where a key lies beyond the query, else zero: `[S, S]`.
at::Tensor added_mask(const EagerAlibiOptions& options) {
  return at::full({options.sequence, options.sequence}, -kInfinity, float_options(options)).triu(1).to(options.dtype);
}

// The mask is filled in.
EagerSoftmax make_masked_fill(const EagerAlibiOptions& options) {
  const at::Tensor mask = at::ones({options.sequence, options.sequence}, float_options(options)).triu(1).to(at::kBool);
  return [bias = make_stored_relu(options), mask](const at::Tensor& scores, const at::Tensor& slopes, double scale) {
    return at::softmax((scores * scale + bias(slopes)).masked_fill(mask, -kInfinity), -1);
  };
}

// The mask is added (Press et al.'s own code).
EagerSoftmax make_added_mask(const EagerAlibiOptions& options) {
  return [bias = make_stored_relu(options), mask = added_mask(options)](
             const at::Tensor& scores, const at::Tensor& slopes, double scale) {
    return at::softmax(scores * scale + (bias(slopes) + mask), -1);
  };
}

// Bias and mask are one matrix, to which the scaled scores are added in one kernel, as BLOOM's baddbmm does.
EagerSoftmax make_scaled_add(const EagerAlibiOptions& options) {
  return [bias = make_stored_relu(options), mask = added_mask(options)](
             const at::Tensor& scores, const at::Tensor& slopes, double scale) {
    return at::softmax(at::add(bias(slopes) + mask, scores, scale), -1);
  };
}

}  // namespace

std::vector<EagerAlibi> eager_alibi_biases(at::ScalarType dtype) {
  std::vector<EagerAlibi> formulations{{"abs", make_abs}, {"stored_distances", make_stored_distances}};
  if (dtype != at::kFloat) {
    formulations.push_back({"stored_in_dtype", make_stored_in_dtype});
  }
  return formulations;
}

std::vector<EagerAlibiSoftmax> eager_alibi_softmaxes() {
  return {{"masked_fill", make_masked_fill}, {"added_mask", make_added_mask}, {"scaled_add", make_scaled_add}};
}

}  // namespace posenc::bench
