#include <ops/rotary_tables.h>

#include <ops/dispatch.h>
#include <posenc/frequencies.h>

#include <torch/library.h>

#include <utility>

namespace posenc {

using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  m.def(
      "rotary_tables(Tensor inv_freq, SymInt length, *, ScalarType dtype=float, float attention_factor=1.0) "
      "-> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rotary_tables_backward(Tensor grad_cos, Tensor grad_sin, Tensor cos, Tensor sin, *, ScalarType dtype=float) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
}

std::tuple<Tensor, Tensor> rotary_tables_symint(
    const Tensor& inv_freq,
    c10::SymInt length,
    at::ScalarType dtype,
    double attention_factor) {
  static const auto op = find_operator<decltype(rotary_tables_symint)>("posenc::rotary_tables");
  return op.call(inv_freq, std::move(length), dtype, attention_factor);
}

std::tuple<Tensor, Tensor> rotary_tables(
    const Tensor& inv_freq,
    int64_t length,
    at::ScalarType dtype,
    double attention_factor) {
  // Without a tensor the dispatcher has no device to go by, and says that rather than what is wrong.
  TORCH_CHECK(inv_freq.defined(), "posenc::rotary_tables: expected inv_freq to be a tensor, got an undefined one");
  return rotary_tables_symint(inv_freq, length, dtype, attention_factor);
}

Tensor rotary_tables_backward(
    const Tensor& grad_cos,
    const Tensor& grad_sin,
    const Tensor& cos,
    const Tensor& sin,
    at::ScalarType dtype) {
  static const auto op = find_operator<decltype(rotary_tables_backward)>("posenc::rotary_tables_backward");
  return op.call(grad_cos, grad_sin, cos, sin, dtype);
}

}  // namespace posenc
