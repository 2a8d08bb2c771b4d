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

/// `slopes * distances`, computed in float32 and cast to `dtype`.
EagerBias scaled(at::ScalarType dtype, at::Tensor distances) {
  return [dtype, distances = std::move(distances)](const at::Tensor& slopes) {
    return (slopes.view({-1, 1, 1}) * distances).to(dtype);
  };
}

// Computes the distances in each call, as in a module without buffers.
EagerBias make_abs(const EagerAlibiOptions& options) {
  return [options](const at::Tensor& slopes) {
    return scaled(options.dtype, relative_positions(options).abs().neg())(slopes);
  };
}

// The model has -|j - i| as a buffer `[S, S]`.
EagerBias make_stored_distances(const EagerAlibiOptions& options) {
  return scaled(options.dtype, relative_positions(options).abs().neg());
}

// The buffer is in the dtype of the model, as after model.to(bfloat16). Fast, but bfloat16 is wrong beyond 256 tokens.
EagerBias make_stored_in_dtype(const EagerAlibiOptions& options) {
  return [dtype = options.dtype, distances = relative_positions(options).abs().neg().to(options.dtype)](
             const at::Tensor& slopes) { return slopes.to(dtype).view({-1, 1, 1}) * distances; };
}

// For causal models: the buffer is -relu(i - j).
EagerBias make_stored_relu(const EagerAlibiOptions& options) {
  return scaled(options.dtype, relative_positions(options).neg().relu().neg());
}

/// Causal mask to add, `[S, S]`: -infinity if the key comes after the query, else 0.
at::Tensor added_mask(const EagerAlibiOptions& options) {
  return at::full({options.sequence, options.sequence}, -kInfinity, float_options(options)).triu(1).to(options.dtype);
}

// Applies the mask by masked_fill.
EagerSoftmax make_masked_fill(const EagerAlibiOptions& options) {
  const at::Tensor mask = at::ones({options.sequence, options.sequence}, float_options(options)).triu(1).to(at::kBool);
  return [bias = make_stored_relu(options), mask](const at::Tensor& scores, const at::Tensor& slopes, double scale) {
    return at::softmax((scores * scale + bias(slopes)).masked_fill(mask, -kInfinity), -1);
  };
}

// Adds the mask, as the code of Press et al. does.
EagerSoftmax make_added_mask(const EagerAlibiOptions& options) {
  return [bias = make_stored_relu(options), mask = added_mask(options)](
             const at::Tensor& scores, const at::Tensor& slopes, double scale) {
    return at::softmax(scores * scale + (bias(slopes) + mask), -1);
  };
}

// Adds bias and mask first. One kernel then scales the scores and adds them, as BLOOM's baddbmm does.
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

at::Tensor library_attention(
    const at::Tensor& q,
    const at::Tensor& k,
    const at::Tensor& v,
    const std::optional<at::Tensor>& bias,
    bool causal) {
  return at::scaled_dot_product_attention(
             q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, /*dropout_p=*/0, causal)
      .transpose(1, 2);
}

std::vector<EagerAlibiSoftmax> eager_alibi_softmaxes() {
  return {{"masked_fill", make_masked_fill}, {"added_mask", make_added_mask}, {"scaled_add", make_scaled_add}};
}

}  // namespace posenc::bench
