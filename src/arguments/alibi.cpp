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

}  // namespace

at::ScalarType alibi_slopes_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

/// All positions and distances must fit into int32.
AlibiShape alibi_shape(const AlibiArguments& a, int64_t batch, int64_t num_heads, int64_t q_len, int64_t k_len) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(
      q_len <= kMax && k_len <= kMax, a.op, ": expected at most ", kMax, " queries and keys, got ", q_len, " and ",
      k_len);
  TORCH_CHECK(
      num_heads == 0 || batch <= kMax / num_heads, a.op, ": expected at most ", kMax, " heads of all batches, got ",
      num_heads, " heads and ", batch, " batches");
  const int64_t offset = a.query_offset.value_or(k_len - q_len);
  // Written without sums of what the user gave, which may overflow.
  TORCH_CHECK(
      offset >= k_len - kMax && offset <= kMax - q_len, a.op,
      ": expected a query_offset for which all distances are below 2^31, ", k_len - kMax, " to ", kMax - q_len, " for ",
      q_len, " queries and ", k_len, " keys, got ", offset);
  return {batch,   num_heads, static_cast<int32_t>(q_len), static_cast<int32_t>(k_len), static_cast<int32_t>(offset),
          a.causal};
}

AlibiShape alibi_shape(const AlibiArguments& a, const char* name, const Tensor& scores) {
  check_defined(a.op, name, scores);
  TORCH_CHECK(
      scores.dim() == 4 || scores.dim() == 3, a.op, ": expected ", name,
      " of shape [B, H, Sq, Sk] or [H, Sq, Sk], got ", scores.sizes());
  TORCH_CHECK(
      is_served(scores.scalar_type()), a.op, ": expected ", name,
      " of dtype float16, bfloat16, float32 or float64, got ", scores.scalar_type());
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

AlibiAddProblem alibi_bias_problem(
    const AlibiArguments& a,
    const Tensor& slopes,
    int64_t q_len,
    int64_t k_len,
    at::ScalarType dtype) {
  TORCH_CHECK(is_served(dtype), a.op, ": expected dtype float16, bfloat16, float32 or float64, got ", dtype);
  TORCH_CHECK(
      q_len >= 0 && k_len >= 0, a.op, ": expected q_len and k_len that are not negative, got ", q_len, " and ", k_len);
  check_defined(a.op, "slopes", slopes);
  AlibiAddProblem problem{};
  problem.slopes = alibi_slopes_view(a.op, slopes, /*num_heads=*/-1, dtype, slopes.device());
  problem.shape = alibi_shape(a, 1, slopes.size(0), q_len, k_len);
  return problem;
}

AlibiAddProblem alibi_add_problem(const AlibiArguments& a, const Tensor& scores, const Tensor& slopes) {
  AlibiAddProblem problem{};
  problem.shape = alibi_shape(a, "scores", scores);
  problem.slopes = alibi_slopes_view(a.op, slopes, problem.shape.num_heads, scores.scalar_type(), scores.device());
  problem.in = scores_in(scores);
  return problem;
}

AlibiAddProblem alibi_add_in_place_problem(const AlibiArguments& a, Tensor& scores, const Tensor& slopes) {
  AlibiAddProblem problem = alibi_add_problem(a, scores, slopes);
  TORCH_CHECK(
      !may_overlap(scores), a.op, ": expected scores whose elements are each a place of their own, got strides ",
      scores.strides(), " for sizes ", scores.sizes(), "; clone() them first");
  TORCH_CHECK(
      !may_overlap(scores, slopes), a.op, ": expected scores and slopes in memory of their own, got two that overlap");
  problem.out = {scores.is_meta() ? nullptr : scores.mutable_data_ptr(), problem.in.strides};
  return problem;
}

AlibiAddProblem alibi_mask_problem(const AlibiArguments& a, const Tensor& grad) {
  AlibiAddProblem problem{};
  problem.shape = alibi_shape(a, "grad", grad);
  problem.in = scores_in(grad);
  return problem;
}

AlibiSoftmaxProblem alibi_softmax_problem(
    const AlibiArguments& a,
    const Tensor& scores,
    const Tensor& slopes,
    double scale,
    const std::optional<Tensor>& key_padding_mask) {
  AlibiSoftmaxProblem problem{};
  problem.shape = alibi_shape(a, "scores", scores);
  problem.slopes = alibi_slopes_view(a.op, slopes, problem.shape.num_heads, scores.scalar_type(), scores.device());
  problem.in = scores_in(scores);
  problem.scale = scale;
  if (key_padding_mask.has_value()) {
    const Tensor& mask = *key_padding_mask;
    check_defined(a.op, "key_padding_mask", mask);
    TORCH_CHECK(
        mask.scalar_type() == at::kBool, a.op, ": expected key_padding_mask of dtype bool, got ", mask.scalar_type());
    TORCH_CHECK(
        mask.device() == scores.device(), a.op, ": expected key_padding_mask on the device of scores, ",
        scores.device(), ", got ", mask.device());
    TORCH_CHECK(
        mask.dim() == 2 && mask.size(0) == problem.shape.batch && mask.size(1) == problem.shape.k_len, a.op,
        ": expected key_padding_mask of shape [B, Sk] = [", problem.shape.batch, ", ", problem.shape.k_len, "], got ",
        mask.sizes());
    problem.padding = {
        mask.is_meta() ? nullptr : mask.const_data_ptr<bool>(), used_stride(mask, 0),
        mask.size(1) == 1 ? 1 : mask.stride(1)};
  }
  return problem;
}

AlibiSoftmaxBackwardProblem alibi_softmax_backward_problem(
    const AlibiArguments& a,
    const Tensor& grad,
    const Tensor& probs,
    double scale) {
  AlibiSoftmaxBackwardProblem problem{};
  problem.shape = alibi_shape(a, "probs", probs);
  TORCH_CHECK(
      grad.defined() && grad.sizes() == probs.sizes() && grad.scalar_type() == probs.scalar_type() &&
          grad.device() == probs.device(),
      a.op, ": expected grad of the shape, dtype and device of probs, ", probs.sizes(), " ", probs.scalar_type(), " ",
      probs.device(), ", got ",
      grad.defined() ? c10::str(grad.sizes(), " ", grad.scalar_type(), " ", grad.device()) : "an undefined tensor");
  problem.grad = scores_in(grad);
  problem.probs = scores_in(probs);
  problem.scale = scale;
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
