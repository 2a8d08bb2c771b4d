#include <ops/rotary_tables.h>

#include <arguments/tensor.h>
#include <ops/dispatch.h>
#include <posenc/frequencies.h>

#include <torch/library.h>

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

namespace dispatch {

std::tuple<Tensor, Tensor> rotary_tables(const FrequenciesArguments<c10::SymInt>& arguments) {
  return call_operator<&rotary_tables>("posenc::rotary_tables", arguments);
}

Tensor rotary_tables_backward(const FrequenciesBackwardArguments& arguments) {
  return call_operator<&rotary_tables_backward>("posenc::rotary_tables_backward", arguments);
}

}  // namespace dispatch

std::tuple<Tensor, Tensor> rotary_tables(
    const Tensor& inv_freq,
    int64_t length,
    at::ScalarType dtype,
    double attention_factor) {
  arguments::check_defined("posenc::rotary_tables", "inv_freq", inv_freq);
  return dispatch::rotary_tables({inv_freq, length, dtype, attention_factor});
}

}  // namespace posenc
