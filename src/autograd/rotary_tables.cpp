#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <meta/detail/symbolic.h>
#include <ops/dispatch.h>
#include <ops/rotary_tables.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <tuple>

namespace posenc {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// The derivatives of `cos` and `sin` are functions of `sin` and `cos`, so only the two outputs are saved. Saved as
/// outputs, they carry second derivatives back to the frequencies.
class RotaryTablesBackward final : public autograd::Node<RotaryTablesBackward> {
 public:
  RotaryTablesBackward() = default;
  explicit RotaryTablesBackward(at::ScalarType dtype) : dtype_(dtype) {}

  void save_outputs(const Tensor& cos, const Tensor& sin) {
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
      result[0] = dispatch::rotary_tables_backward({grad_cos, grad_sin, cos, sin, dtype_});
    }
    return result;
  }

 private:
  at::ScalarType dtype_ = at::kFloat;  // dtype of the frequencies
  SavedVariable cos_, sin_;
};

std::tuple<Tensor, Tensor> rotary_tables_autograd(const FrequenciesArguments<c10::SymInt>& a) {
  return autograd::forward_and_record<RotaryTablesBackward>(
      "posenc::rotary_tables", {a.inv_freq}, [&] { return dispatch::rotary_tables(a); }, a.inv_freq.scalar_type());
}

/// A gradient that is itself differentiated is computed in tensor operations, which LibTorch differentiates. Their cost
/// is small: a table [P, R/2] has few elements beside the tensors that it rotates.
Tensor rotary_tables_backward_autograd(const FrequenciesBackwardArguments& a) {
  const autograd::Differentiable differentiable{a.grad_cos, a.grad_sin, a.cos, a.sin};
  autograd::check_no_tangents("posenc::rotary_tables_backward", differentiable);
  if (!autograd::any_requires_grad(differentiable)) {
    return autograd::below_autograd([&] { return dispatch::rotary_tables_backward(a); });
  }
  if (!meta::any_symbol(a)) {
    arguments::check_frequencies_backward(a);
  }
  const auto wide = [](const Tensor& tensor) { return tensor.to(at::kDouble); };
  const Tensor positions = at::arange(c10::Scalar(a.cos.sym_size(0)), a.cos.options().dtype(at::kDouble)).unsqueeze(1);
  return ((wide(a.cos) * wide(a.grad_sin) - wide(a.sin) * wide(a.grad_cos)) * positions).sum(0).to(a.dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("rotary_tables", kernel<rotary_tables_autograd>);
  m.impl("rotary_tables_backward", kernel<rotary_tables_backward_autograd>);
}

}  // namespace posenc
