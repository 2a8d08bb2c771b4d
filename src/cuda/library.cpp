#include <arguments/alibi.h>
#include <arguments/qk_norm_rotary_embedding.h>
#include <arguments/rotary_embedding.h>
#include <arguments/rotary_embedding_qkv.h>
#include <arguments/rotary_embedding_tables_backward.h>
#include <arguments/rotary_frequencies.h>
#include <cuda/detail/dtype.h>
#include <cuda/detail/score_grid.h>
#include <cuda/kernels.h>
#include <ops/dispatch.h>

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

// The operators on CUDA: checks and outputs as on all devices, then a kernel.
namespace posenc {
namespace {

using at::Tensor;
using c10::cuda::CUDAGuard;
using cuda::dtype_of;

/// `kLaunch` for tensors of the dtype and device of `like`.
template <auto kLaunch, typename Problem>
void run(const Problem& problem, const Tensor& like) {
  const CUDAGuard device(like.device());
  kLaunch(problem, dtype_of(like.scalar_type()));
}

void run_rotary_backward(
    const char* op,
    const RotaryBackwardProblem& problem,
    bool writes_input_grads,
    const arguments::RotaryTablesCall& call,
    const Tensor& like) {
  const int64_t num_heads = problem.tables.operands[0].num_heads + problem.tables.operands[1].num_heads;
  if (problem.tables.tokens * num_heads == 0) {
    call.grad_cos.zero_();
    call.grad_sin.zero_();
    return;
  }
  const CUDAGuard device(like.device());
  cuda::rotary_backward(op, problem, writes_input_grads, dtype_of(like.scalar_type()));
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> rotary_embedding_backward_cuda(
    const Rotation& rotation,
    at::TensorList grads,
    at::TensorList inputs) {
  if (!rotation.pair_axes.empty()) {  // a token reads a row for each axis, and no block has all of its pairs
    return rotary_embedding_backward_by_parts(rotation, grads, inputs);
  }
  auto call = arguments::rotary_backward_call(rotation, grads, inputs);
  run_rotary_backward(
      "rotary_embedding_backward", call.problem, /*writes_input_grads=*/true, call.tables, grads.front());
  return {std::move(call.input_grads), call.tables.grad_cos, call.tables.grad_sin};
}

std::tuple<Tensor, Tensor> rotary_embedding_tables_backward_cuda(
    const Rotation& rotation,
    at::TensorList grads,
    at::TensorList inputs) {
  const auto call = arguments::rotary_tables_call(rotation, grads, inputs);
  RotaryBackwardProblem problem{call.problem, {}};
  problem.rotation.num_pairs = call.problem.num_pairs;
  run_rotary_backward("rotary_embedding_tables_backward", problem, /*writes_input_grads=*/false, call, inputs.front());
  return {call.grad_cos, call.grad_sin};
}

std::tuple<Tensor, Tensor> rotary_tables_cuda(const arguments::FrequenciesArguments<int64_t>& a) {
  const auto call = arguments::frequencies_call(a);
  if (call.problem.length > 0 && call.problem.num_pairs > 0) {
    const CUDAGuard device(a.inv_freq.device());
    cuda::rotary_tables(call.problem, dtype_of(a.inv_freq.scalar_type()), dtype_of(a.dtype));
  }
  return {call.cos, call.sin};
}

Tensor rotary_tables_backward_cuda(const arguments::FrequenciesBackwardArguments& a) {
  const auto problem = arguments::frequencies_backward_problem(a);
  Tensor result = at::empty({problem.num_pairs}, a.cos.options().dtype(a.dtype));
  if (problem.length == 0 || problem.num_pairs == 0) {
    return result.zero_();
  }
  const CUDAGuard device(a.cos.device());
  cuda::rotary_tables_backward(problem, dtype_of(a.cos.scalar_type()), result.mutable_data_ptr(), dtype_of(a.dtype));
  return result;
}

Tensor alibi_slopes_backward_cuda(const arguments::AlibiSlopesBackwardArguments<int64_t>& a) {
  const AlibiShape shape = arguments::alibi_slopes_backward_shape(a);
  const at::ScalarType dtype = a.grad.scalar_type();
  Tensor result = at::empty({shape.num_heads}, a.grad.options().dtype(arguments::alibi_slopes_dtype(dtype)));
  if (cuda::is_empty(shape)) {
    return result.zero_();
  }
  const CUDAGuard device(a.grad.device());
  cuda::alibi_slopes_backward(shape, arguments::scores_in(a.grad), dtype_of(dtype), result.mutable_data_ptr());
  return result;
}

constexpr auto kRotate = run<cuda::rotate, RotaryProblem>;
constexpr auto kAlibiAdd = run<cuda::alibi_add, AlibiAddProblem>;

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CUDA, m) {
  m.impl("rotary_embedding", kernel<arguments::rotary_embedding<kRotate>>);
  m.impl("rotary_embedding_", kernel<arguments::rotary_embedding_in_place<kRotate>>);
  m.impl("rotary_embedding_qk", kernel<arguments::rotary_embedding_qk<kRotate>>);
  m.impl("rotary_embedding_qk_", kernel<arguments::rotary_embedding_qk_in_place<kRotate>>);
  m.impl("rotary_embedding_qkv", kernel<arguments::rotary_embedding_qkv<kRotate>>);
  m.impl("rotary_embedding_pack", kernel<arguments::rotary_embedding_pack<kRotate>>);
  m.impl("rotary_embedding_backward", kernel<rotary_embedding_backward_cuda>);
  m.impl("rotary_embedding_tables_backward", kernel<rotary_embedding_tables_backward_cuda>);
  m.impl("rotary_tables", kernel<rotary_tables_cuda>);
  m.impl("rotary_tables_backward", kernel<rotary_tables_backward_cuda>);
  m.impl(
      "qk_norm_rotary_embedding",
      kernel<arguments::qk_norm_rotary_embedding<run<cuda::qk_norm_rotate, QKNormRotaryProblem>>>);
  m.impl(
      "qk_norm_rotary_embedding_backward",
      kernel<arguments::qk_norm_rotary_embedding_backward<
          run<cuda::qk_norm_rotate_backward, QKNormRotaryBackwardProblem>>>);
  m.impl("alibi_bias", kernel<arguments::alibi_bias<run<cuda::alibi_bias, AlibiAddProblem>>>);
  m.impl("alibi_add", kernel<arguments::alibi_add<kAlibiAdd>>);
  m.impl("alibi_add_", kernel<arguments::alibi_add_in_place<kAlibiAdd>>);
  m.impl("alibi_mask", kernel<arguments::alibi_mask<run<cuda::alibi_mask, AlibiAddProblem>>>);
  m.impl("alibi_softmax", kernel<arguments::alibi_softmax<run<cuda::alibi_softmax, AlibiSoftmaxProblem>>>);
  m.impl(
      "alibi_softmax_backward",
      kernel<arguments::alibi_softmax_backward<run<cuda::alibi_softmax_backward, AlibiSoftmaxBackwardProblem>>>);
  m.impl("alibi_slopes_backward", kernel<alibi_slopes_backward_cuda>);
}

}  // namespace posenc
