#include <ops/rotary_tables.h>

#include <arguments/tensor.h>
#include <posenc/frequencies.h>

namespace posenc {

using at::Tensor;

TORCH_LIBRARY_FRAGMENT(posenc, m) {
  define(
      m,
      "rotary_tables(Tensor inv_freq, SymInt length, *, ScalarType dtype=float, float attention_factor=1.0) "
      "-> (Tensor, Tensor)");
  define(
      m,
      "rotary_tables_backward(Tensor grad_cos, Tensor grad_sin, Tensor cos, Tensor sin, *, ScalarType dtype=float) "
      "-> Tensor");
}

std::tuple<Tensor, Tensor> rotary_tables(
    const Tensor& inv_freq,
    int64_t length,
    at::ScalarType dtype,
    double attention_factor) {
  arguments::check_defined("posenc::rotary_tables", "inv_freq", inv_freq);
  return dispatch::rotary_tables({inv_freq, length, dtype, attention_factor});
}

}  // namespace posenc
