#include <arguments/rotary_frequencies.h>

#include <ATen/ops/empty.h>

#include <cmath>

namespace posenc::arguments {
namespace {

using at::Tensor;

bool is_real(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble;
}

TableView view_of(const Tensor& table) {
  return {table.const_data_ptr(), table.stride(0), table.stride(1)};
}

}  // namespace

void check_frequencies(const FrequenciesArguments<int64_t>& a) {
  constexpr const char* op = "posenc::rotary_tables";
  const Tensor& inv_freq = a.inv_freq;
  TORCH_CHECK(
      inv_freq.defined() && inv_freq.dim() == 1 && is_real(inv_freq.scalar_type()), op,
      ": expected inv_freq of dtype float32 or float64 and shape [R/2], got ",
      inv_freq.defined() ? c10::str(inv_freq.scalar_type(), " ", inv_freq.sizes()) : "an undefined tensor");
  TORCH_CHECK(a.length >= 0, op, ": expected a length that is not negative, got ", a.length);
  TORCH_CHECK(is_real(a.dtype), op, ": expected dtype float32 or float64, got ", a.dtype);
  TORCH_CHECK(
      a.attention_factor > 0 && std::isfinite(a.attention_factor), op, ": expected a positive attention_factor, got ",
      a.attention_factor);
}

FrequenciesCall frequencies_call(const FrequenciesArguments<int64_t>& a) {
  check_frequencies(a);
  const Tensor& inv_freq = a.inv_freq;
  FrequenciesCall call;
  call.cos = at::empty({a.length, inv_freq.size(0)}, inv_freq.options().dtype(a.dtype));
  call.sin = at::empty({a.length, inv_freq.size(0)}, inv_freq.options().dtype(a.dtype));
  call.problem = {inv_freq.const_data_ptr(),  inv_freq.stride(0), a.length,
                  inv_freq.size(0),           a.attention_factor, call.cos.mutable_data_ptr(),
                  call.sin.mutable_data_ptr()};
  return call;
}

void check_frequencies_backward(const FrequenciesBackwardArguments& a) {
  constexpr const char* op = "posenc::rotary_tables_backward";
  TORCH_CHECK(
      a.cos.defined() && a.cos.dim() == 2 && is_real(a.cos.scalar_type()), op,
      ": expected cos of dtype float32 or float64 and shape [P, R/2], got ",
      a.cos.defined() ? c10::str(a.cos.scalar_type(), " ", a.cos.sizes()) : "an undefined tensor");
  const auto check_like_cos = [&](const char* name, const Tensor& tensor) {
    TORCH_CHECK(
        tensor.defined() && tensor.sizes() == a.cos.sizes() && tensor.scalar_type() == a.cos.scalar_type() &&
            tensor.device() == a.cos.device(),
        op, ": expected ", name, " of the shape, dtype and device of cos, ", a.cos.sizes(), " ", a.cos.scalar_type(),
        " ", a.cos.device(), ", got ",
        tensor.defined() ? c10::str(tensor.sizes(), " ", tensor.scalar_type(), " ", tensor.device())
                         : "an undefined tensor");
  };
  check_like_cos("sin", a.sin);
  check_like_cos("grad_cos", a.grad_cos);
  check_like_cos("grad_sin", a.grad_sin);
  TORCH_CHECK(is_real(a.dtype), op, ": expected dtype float32 or float64, got ", a.dtype);
}

FrequenciesBackwardProblem frequencies_backward_problem(const FrequenciesBackwardArguments& a) {
  check_frequencies_backward(a);
  return {view_of(a.grad_cos), view_of(a.grad_sin), view_of(a.cos), view_of(a.sin), a.cos.size(0), a.cos.size(1)};
}

}  // namespace posenc::arguments
