#include <arguments/alibi.h>
#include <arguments/overlap.h>
#include <arguments/tensor.h>

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <limits>

namespace posenc::arguments {
namespace {

using at::Tensor;

ScoreStrides strides_of_scores(const Tensor& tensor) {
  return {
      tensor.dim() == 4 ? used_stride(tensor, 0) : 0, used_stride(tensor, -3), used_stride(tensor, -2),
      tensor.size(-1) == 1 ? 1 : tensor.stride(-1)};
}

/// Describes a call of `op`, `alibi_add` or `alibi_add_`, without its output.
AlibiAddProblem add_problem(const char* op, const AlibiAddArguments<int64_t>& a) {
  AlibiAddProblem problem{};
  problem.shape = alibi_shape({op, a.causal, a.query_offset}, "scores", a.scores);
  problem.slopes = alibi_slopes_view(op, a.slopes, problem.shape.num_heads, a.scores.scalar_type(), a.scores.device());
  problem.in = scores_in(a.scores);
  return problem;
}

}  // namespace

at::ScalarType alibi_slopes_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

/// All positions and distances must fit into int32.
AlibiShape alibi_shape(const AlibiOptions& a, int64_t batch, int64_t num_heads, int64_t q_len, int64_t k_len) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(
      q_len <= kMax && k_len <= kMax, a.op, ": expected at most ", kMax, " queries and keys, got ", q_len, " and ",
      k_len);
  TORCH_CHECK(
      num_heads == 0 || batch <= kMax / num_heads, a.op, ": expected at most ", kMax, " heads of all batches, got ",
      num_heads, " heads and ", batch, " batches");
  const int64_t offset = a.query_offset.value_or(k_len - q_len);
  // Not written with `query_offset + q_len`, which may overflow.
  TORCH_CHECK(
      offset >= k_len - kMax && offset <= kMax - q_len, a.op,
      ": expected a query_offset for which all distances are below 2^31, ", k_len - kMax, " to ", kMax - q_len, " for ",
      q_len, " queries and ", k_len, " keys, got ", offset);
  return {batch,   num_heads, static_cast<int32_t>(q_len), static_cast<int32_t>(k_len), static_cast<int32_t>(offset),
          a.causal};
}

AlibiShape alibi_shape(const AlibiOptions& a, const char* name, const Tensor& scores) {
  check_defined(a.op, name, scores);
  TORCH_CHECK(
      scores.dim() == 4 || scores.dim() == 3, a.op, ": expected ", name,
      " of shape [B, H, Sq, Sk] or [H, Sq, Sk], got ", scores.sizes());
  check_served(a.op, {name, scores});
  return alibi_shape(a, scores.dim() == 4 ? scores.size(0) : 1, scores.size(-3), scores.size(-2), scores.size(-1));
}

SlopesView alibi_slopes_view(
    const char* op,
    const Tensor& slopes,
    int64_t num_heads,
    at::ScalarType dtype,
    c10::Device device,
    const char* beside) {
  check_defined(op, "slopes", slopes);
  TORCH_CHECK(
      slopes.dim() == 1 && (num_heads < 0 || slopes.size(0) == num_heads), op, ": expected slopes of shape [H]",
      num_heads < 0 ? "" : c10::str(" = [", num_heads, "]"), ", got ", slopes.sizes());
  const auto slopes_dtype = slopes.scalar_type();
  TORCH_CHECK(
      slopes_dtype == at::kFloat || (slopes_dtype == at::kDouble && dtype == at::kDouble), op,
      ": expected slopes of dtype float32", dtype == at::kDouble ? " or float64" : "", " with ", dtype, ", got ",
      slopes_dtype);
  TORCH_CHECK(
      slopes.device() == device, op, ": expected slopes on the device of ", beside, ", ", device, ", got ",
      slopes.device());
  return {slopes.is_meta() ? nullptr : slopes.const_data_ptr(), slopes.stride(0), slopes_dtype == at::kDouble};
}

AlibiAddProblem alibi_bias_problem(const AlibiBiasArguments<int64_t>& a) {
  constexpr const char* kOp = "posenc::alibi_bias";
  TORCH_CHECK(is_served(a.dtype), kOp, ": expected dtype float16, bfloat16, float32 or float64, got ", a.dtype);
  TORCH_CHECK(
      a.q_len >= 0 && a.k_len >= 0, kOp, ": expected q_len and k_len that are not negative, got ", a.q_len, " and ",
      a.k_len);
  check_defined(kOp, "slopes", a.slopes);
  AlibiAddProblem problem{};
  problem.slopes = alibi_slopes_view(kOp, a.slopes, /*num_heads=*/-1, a.dtype, a.slopes.device());
  problem.shape = alibi_shape({kOp, a.causal, a.query_offset}, 1, a.slopes.size(0), a.q_len, a.k_len);
  return problem;
}

AlibiAddProblem alibi_add_problem(const AlibiAddArguments<int64_t>& a) {
  return add_problem("posenc::alibi_add", a);
}

AlibiAddProblem alibi_add_in_place_problem(const AlibiAddArguments<int64_t>& a) {
  constexpr const char* kOp = "posenc::alibi_add_";
  AlibiAddProblem problem = add_problem(kOp, a);
  check_no_overlap(kOp, {"scores", a.scores});
  check_no_overlap(kOp, {"scores", a.scores}, {"slopes", a.slopes});
  problem.out = {a.scores.is_meta() ? nullptr : a.scores.mutable_data_ptr(), problem.in.strides};
  return problem;
}

AlibiAddProblem alibi_mask_problem(const AlibiMaskArguments<int64_t>& a) {
  AlibiAddProblem problem{};
  problem.shape = alibi_shape({"posenc::alibi_mask", /*causal=*/true, a.query_offset}, "grad", a.grad);
  problem.in = scores_in(a.grad);
  return problem;
}

AlibiShape alibi_slopes_backward_shape(const AlibiSlopesBackwardArguments<int64_t>& a) {
  return alibi_shape({"posenc::alibi_slopes_backward", a.causal, a.query_offset}, "grad", a.grad);
}

AlibiSoftmaxProblem alibi_softmax_problem(const AlibiSoftmaxArguments<int64_t>& a) {
  constexpr const char* kOp = "posenc::alibi_softmax";
  AlibiSoftmaxProblem problem{};
  problem.shape = alibi_shape({kOp, a.causal, a.query_offset}, "scores", a.scores);
  problem.slopes = alibi_slopes_view(kOp, a.slopes, problem.shape.num_heads, a.scores.scalar_type(), a.scores.device());
  problem.in = scores_in(a.scores);
  problem.scale = a.scale;
  if (a.key_padding_mask.has_value()) {
    const Tensor& mask = *a.key_padding_mask;
    check_defined(kOp, "key_padding_mask", mask);
    TORCH_CHECK(
        mask.scalar_type() == at::kBool, kOp, ": expected key_padding_mask of dtype bool, got ", mask.scalar_type());
    check_device(kOp, {"key_padding_mask", mask}, {"scores", a.scores});
    TORCH_CHECK(
        mask.dim() == 2 && mask.size(0) == problem.shape.batch && mask.size(1) == problem.shape.k_len, kOp,
        ": expected key_padding_mask of shape [B, Sk] = [", problem.shape.batch, ", ", problem.shape.k_len, "], got ",
        mask.sizes());
    problem.padding = {
        mask.is_meta() ? nullptr : mask.const_data_ptr<bool>(), used_stride(mask, 0),
        mask.size(1) == 1 ? 1 : mask.stride(1)};
  }
  return problem;
}

AlibiSoftmaxBackwardProblem alibi_softmax_backward_problem(const AlibiSoftmaxBackwardArguments<int64_t>& a) {
  constexpr const char* kOp = "posenc::alibi_softmax_backward";
  AlibiSoftmaxBackwardProblem problem{};
  problem.shape = alibi_shape({kOp, a.causal, a.query_offset}, "probs", a.probs);
  check_like(kOp, {"grad", a.grad}, {"probs", a.probs});
  problem.grad = scores_in(a.grad);
  problem.probs = scores_in(a.probs);
  problem.scale = a.scale;
  return problem;
}

ScoresIn scores_in(const Tensor& tensor) {
  return {tensor.is_meta() ? nullptr : tensor.const_data_ptr(), strides_of_scores(tensor)};
}

Tensor allocate_output(const Tensor& input, ScoresOut& out) {
  Tensor output = at::empty_like(input);
  out = {output.mutable_data_ptr(), strides_of_scores(output)};
  return output;
}

AlibiSlopesGradient allocate_slopes_gradient(const Tensor& probs, AlibiSoftmaxBackwardProblem& problem) {
  const AlibiShape& shape = problem.shape;
  AlibiSlopesGradient slopes{
      at::empty({shape.num_heads}, probs.options().dtype(alibi_slopes_dtype(probs.scalar_type()))),
      at::empty({shape.num_heads, shape.batch, shape.q_len}, probs.options().dtype(at::kDouble))};
  problem.slopes = slopes.result.mutable_data_ptr();
  problem.row_sums = slopes.row_sums.mutable_data_ptr<double>();
  return slopes;
}

Tensor allocate_bias(const Tensor& slopes, at::ScalarType dtype, AlibiAddProblem& problem) {
  const AlibiShape& shape = problem.shape;
  Tensor output = at::empty({shape.num_heads, shape.q_len, shape.k_len}, slopes.options().dtype(dtype));
  problem.out = {output.mutable_data_ptr(), strides_of_scores(output)};
  return output;
}

}  // namespace posenc::arguments
