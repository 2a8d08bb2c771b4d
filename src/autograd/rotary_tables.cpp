#include <arguments/rotary_frequencies.h>
#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <meta/detail/symbolic.h>
#include <ops/rotary_tables.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <tuple>
#include <utility>

namespace posenc {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// The derivatives of `cos` and `sin` are made of `sin` and `cos`: the two outputs are all that is saved. As outputs
/// they carry second derivatives back to the frequencies.
class RotaryTablesBackward final : public autograd::Node<RotaryTablesBackward> {
 public:
  RotaryTablesBackward() = default;
  explicit RotaryTablesBackward(at::ScalarType dtype) : dtype_(dtype) {}

  void save(const Tensor& cos, const Tensor& sin) {
    cos_ = SavedVariable(cos, /*is_output=*/true);
    sin_ = SavedVariable(sin, /*is_output=*/true);
  }

  auto state() { return std::tie(dtype_, cos_, sin_); }

  variable_list differentiate(const variable_list& grads) {
    variable_list result(1);
    if ((grads[0].defined() || grads[1].defined()) && wants(0)) {
      const Tensor cos = unpack(cos_);
      const Tensor sin = unpack(sin_);
      const Tensor grad_cos = grads[0].defined() ? grads[0] : at::zeros_like(cos);
      const Tensor grad_sin = grads[1].defined() ? grads[1] : at::zeros_like(sin);
      result[0] = rotary_tables_backward(grad_cos, grad_sin, cos, sin, dtype_);
    }
    return result;
  }

  std::string name() const override { return "RotaryTablesBackward"; }

 private:
  at::ScalarType dtype_ = at::kFloat;  // of the frequencies
  SavedVariable cos_, sin_;
};

std::tuple<Tensor, Tensor> rotary_tables_autograd(
    const Tensor& inv_freq,
    c10::SymInt length,
    at::ScalarType dtype,
    double attention_factor) {
  autograd::check_no_tangent("posenc::rotary_tables", inv_freq);
  auto tables = autograd::below_autograd(
      [&] { return rotary_tables_symint(inv_freq, std::move(length), dtype, attention_factor); });
  const autograd::Differentiable differentiable{inv_freq};
  if (autograd::any_requires_grad(differentiable)) {
    const auto node = autograd::make_node<RotaryTablesBackward>(differentiable, inv_freq.scalar_type());
    const auto& [cos, sin] = tables;
    torch::autograd::set_history(cos, node);
    torch::autograd::set_history(sin, node);
    static_cast<RotaryTablesBackward&>(*node).save(cos, sin);
  }
  return tables;
}

/// Where the gradient is itself differentiated, it is computed in tensor operations, which LibTorch differentiates.
/// Their cost is small: a table [P, R/2] has few elements beside the tensors that it rotates.
Tensor rotary_tables_backward_autograd(
    const Tensor& grad_cos,
    const Tensor& grad_sin,
    const Tensor& cos,
    const Tensor& sin,
    at::ScalarType dtype) {
  const autograd::Differentiable differentiable{grad_cos, grad_sin, cos, sin};
  autograd::check_no_tangents("posenc::rotary_tables_backward", differentiable);
  if (!autograd::any_requires_grad(differentiable)) {
    return autograd::below_autograd([&] { return rotary_tables_backward(grad_cos, grad_sin, cos, sin, dtype); });
  }
  if (!meta::any_symbolic(differentiable)) {
    arguments::check_frequencies_backward({grad_cos, grad_sin, cos, sin, dtype});
  }
  const auto wide = [](const Tensor& tensor) { return tensor.to(at::kDouble); };
  const Tensor positions = at::arange(c10::Scalar(cos.sym_size(0)), cos.options().dtype(at::kDouble)).unsqueeze(1);
  return ((wide(cos) * wide(grad_sin) - wide(sin) * wide(grad_cos)) * positions).sum(0).to(dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("rotary_tables", rotary_tables_autograd);
  m.impl("rotary_tables_backward", rotary_tables_backward_autograd);
}

}  // namespace posenc
