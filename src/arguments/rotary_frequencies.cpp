#include <arguments/rotary_frequencies.h>
#include <arguments/tensor.h>

#include <ATen/ops/empty.h>

#include <cmath>

namespace posenc::arguments {
namespace {

using at::Tensor;

bool is_real(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble;
}

/// Checks a float32 or float64 tensor of `dims` dimensions, whose shape is `shape` in messages.
void check_real(const char* op, const NamedTensor& x, int64_t dims, const char* shape) {
  TORCH_CHECK(
      x.tensor.defined() && x.tensor.dim() == dims && is_real(x.tensor.scalar_type()), op, ": expected ", x.name,
      " of dtype float32 or float64 and shape ", shape, ", got ",
      x.tensor.defined() ? c10::str(x.tensor.scalar_type(), " ", x.tensor.sizes()) : "an undefined tensor");
}

TableView view_of(const Tensor& table) {
  return {table.const_data_ptr(), table.stride(0), table.stride(1)};
}

}  // namespace

void check_frequencies(const FrequenciesArguments<int64_t>& a) {
  constexpr const char* op = "posenc::rotary_tables";
  check_real(op, {"inv_freq", a.inv_freq}, 1, "[R/2]");
  TORCH_CHECK(a.length >= 0, op, ": expected a length that is not negative, got ", a.length);
  TORCH_CHECK(is_real(a.dtype), op, ": expected dtype float32 or float64, got ", a.dtype);
  TORCH_CHECK(
      a.attention_factor > 0 && std::isfinite(a.attention_factor), op,
      ": expected a positive, finite attention_factor, got ", a.attention_factor);
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
  check_real(op, {"cos", a.cos}, 2, "[P, R/2]");
  for (const NamedTensor& x :
       {NamedTensor{"sin", a.sin}, NamedTensor{"grad_cos", a.grad_cos}, NamedTensor{"grad_sin", a.grad_sin}}) {
    check_like(op, x, {"cos", a.cos});
  }
  TORCH_CHECK(is_real(a.dtype), op, ": expected dtype float32 or float64, got ", a.dtype);
}

FrequenciesBackwardProblem frequencies_backward_problem(const FrequenciesBackwardArguments& a) {
  check_frequencies_backward(a);
  return {view_of(a.grad_cos), view_of(a.grad_sin), view_of(a.cos), view_of(a.sin), a.cos.size(0), a.cos.size(1)};
}

}  // namespace posenc::arguments
