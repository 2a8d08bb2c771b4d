#include <autograd/detail/rotate_by_table_gradients.h>
#include <ops/rotary_embedding_tables_backward.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <iterator>

namespace posenc {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The gradients of the tables are bilinear in output gradients and inputs, and both derivatives are rotations
/// by what comes in for the tables:
///
///     d<dcos, c> + d<dsin, s> = rotate(x; c, s) . dg = rotate_back(g; c, s) . dx
class RotaryEmbeddingTablesBackward : public torch::autograd::Function<RotaryEmbeddingTablesBackward> {
 public:
  static variable_list forward(
      AutogradContext* ctx,
      at::TensorList grads,
      at::TensorList inputs,
      const Tensor& table,
      const std::optional<Tensor>& positions,
      bool interleaved,
      bool conjugate) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    variable_list saved;
    saved.reserve(grads.size() + inputs.size() + 2);
    std::copy(grads.begin(), grads.end(), std::back_inserter(saved));
    std::copy(inputs.begin(), inputs.end(), std::back_inserter(saved));
    saved.push_back(table);
    saved.push_back(positions.value_or(Tensor()));
    ctx->save_for_backward(saved);
    ctx->saved_data["interleaved"] = interleaved;
    ctx->saved_data["conjugate"] = conjugate;
    ctx->set_materialize_grads(false);
    auto [grad_cos, grad_sin] =
        rotary_embedding_tables_backward(grads, inputs, table, positions, interleaved, conjugate);
    return {grad_cos, grad_sin};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& table_grads) {
    const variable_list saved = ctx->get_saved_variables();
    const size_t count = (saved.size() - 2) / 2;
    const Tensor& table = saved[2 * count];
    const Tensor& saved_positions = saved[2 * count + 1];
    const auto positions = saved_positions.defined() ? std::optional<Tensor>(saved_positions) : std::nullopt;
    const bool interleaved = ctx->saved_data["interleaved"].toBool();
    const bool conjugate = ctx->saved_data["conjugate"].toBool();

    // grads, inputs, table, positions, interleaved, conjugate
    variable_list result(2 * count + 4);
    if (!table_grads[0].defined() && !table_grads[1].defined()) {
      return result;
    }
    const Tensor cos = table_grads[0].defined() ? table_grads[0] : at::zeros_like(table);
    const Tensor sin = table_grads[1].defined() ? table_grads[1] : at::zeros_like(table);
    for (size_t i = 0; i < count; ++i) {
      const Tensor& grad = saved[i];
      const Tensor& input = saved[count + i];
      if (ctx->needs_input_grad(i)) {
        result[i] = autograd::rotate_by_table_gradients(input, cos, sin, positions, interleaved, conjugate);
      }
      if (ctx->needs_input_grad(count + i)) {
        result[count + i] = autograd::rotate_by_table_gradients(grad, cos, sin, positions, interleaved, !conjugate);
      }
    }
    return result;
  }
};

std::tuple<Tensor, Tensor> rotary_embedding_tables_backward_autograd(
    at::TensorList grads,
    at::TensorList inputs,
    const Tensor& table,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate) {
  const auto table_grads =
      RotaryEmbeddingTablesBackward::apply(grads, inputs, table, positions, interleaved, conjugate);
  return {table_grads[0], table_grads[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("rotary_embedding_tables_backward", rotary_embedding_tables_backward_autograd);
}

}  // namespace posenc
