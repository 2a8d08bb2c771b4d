#include <cuda/detail/attention_options.h>
#include <cuda/detail/dispatch.h>
#include <cuda/detail/dtype.h>
#include <cuda/detail/launch.h>
#include <cuda/detail/tiled_attention.h>
#include <cuda/kernels.h>

#include <ATen/TensorOperators.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>

namespace posenc::cuda {
namespace {

using arguments::AlibiAttention;
using arguments::AttentionBackwardArguments;
using arguments::AttentionSlopeSumsArguments;
using arguments::AttentionTensors;
using at::Tensor;

constexpr int64_t kAlignment = 16;

/// Elements of an aligned address in 16-bit dtypes.
constexpr int64_t kAlignedElements = kAlignment / 2;

/// Positions and distances are int32.
constexpr int64_t kMaxLength = kUnlimitedWindow / 2;

int64_t padded_head_dim(int64_t head_dim) {
  return ceil_div(head_dim, kAlignedElements) * kAlignedElements;
}

/// Whether channels are dense, a multiple of 16 bytes, and all rows are aligned to 16 bytes.
bool is_aligned(const Tensor& x) {
  const int64_t channels = x.dim() - 1;
  if (x.size(channels) % kAlignedElements != 0 || (x.size(channels) > 1 && x.stride(channels) != 1) ||
      reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kAlignment != 0) {
    return false;
  }
  for (int64_t d = 0; d < channels; ++d) {
    if (x.size(d) > 1 && x.stride(d) % kAlignedElements != 0) {
      return false;
    }
  }
  return true;
}

/// `x`, or a copy whose rows are aligned, with zeros in channels that are added.
Tensor aligned(const Tensor& x) {
  if (is_aligned(x)) {
    return x;
  }
  const int64_t head_dim = x.size(-1);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = padded_head_dim(head_dim);
  const Tensor result = at::empty(sizes, x.options());
  result.narrow(-1, 0, head_dim).copy_(x);
  if (sizes.back() > head_dim) {
    result.narrow(-1, head_dim, sizes.back() - head_dim).zero_();
  }
  return result;
}

/// A tensor for a result like `x`, which kernels can write. Tokens of packed tensors may be in no sequence; they are
/// zero.
Tensor result_like(const Tensor& x, const AlibiAttention& call) {
  if (is_aligned(x)) {
    return call.packed() ? at::zeros_like(x) : at::empty_like(x);
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = padded_head_dim(sizes.back());
  return call.packed() ? at::zeros(sizes, x.options()) : at::empty(sizes, x.options());
}

/// The result of kernels, `computed`, as a tensor like `x`.
Tensor as_result(const Tensor& computed, const Tensor& x) {
  return is_aligned(x) ? computed : at::empty_like(x).copy_(computed.narrow(-1, 0, x.size(-1)));
}

bool has_no_work(const AlibiAttention& call, const Tensor& q) {
  return q.numel() == 0 || call.batch == 0;
}

/// The tensors of a call as the kernels read them. They must outlive the launch.
struct Inputs {
  Tensor q, k, v, slopes;
  Tensor seqlens_q, seqlens_k, cu_seqlens_q, cu_seqlens_k;

  Inputs(const AlibiAttention& call, const AttentionTensors& inputs)
      : q(aligned(inputs.q)),
        k(aligned(inputs.k)),
        v(aligned(inputs.v)),
        slopes(inputs.slopes.has_value() ? inputs.slopes->contiguous() : Tensor()),
        seqlens_q(wide(call.seqlens_q)),
        seqlens_k(wide(call.seqlens_k)),
        cu_seqlens_q(wide(call.cu_seqlens_q)),
        cu_seqlens_k(call.cu_seqlens_k.is_same(call.cu_seqlens_q) ? cu_seqlens_q : wide(call.cu_seqlens_k)) {}

  static Tensor wide(const Tensor& lengths) { return lengths.defined() ? lengths.to(at::kLong).contiguous() : lengths; }
};

template <typename Problem>
Problem problem_of(const AlibiAttention& call, const Inputs& x) {
  const auto data = [](const Tensor& lengths) {
    return lengths.defined() ? lengths.const_data_ptr<int64_t>() : nullptr;
  };
  const auto number = [](int64_t value) { return static_cast<int32_t>(value); };
  Problem p{};
  p.q = x.q.const_data_ptr();
  p.k = x.k.const_data_ptr();
  p.v = x.v.const_data_ptr();
  p.q_strides = head_strides(x.q);
  p.k_strides = head_strides(x.k);
  p.v_strides = head_strides(x.v);
  set_slopes(p, x.slopes);
  set_scores(p, call);
  p.seqlens_q = data(x.seqlens_q);
  p.seqlens_k = data(x.seqlens_k);
  p.cu_seqlens_q = data(x.cu_seqlens_q);
  p.cu_seqlens_k = data(x.cu_seqlens_k);
  p.q_tokens = x.q.size(0);
  p.k_tokens = x.k.size(0);
  p.batch = number(call.batch);
  p.q_len = number(call.q_len);
  p.k_len = number(call.k_len);
  p.q_heads = number(call.q_heads);
  p.group = number(call.q_heads / call.k_heads);
  p.head_dim = number(x.q.size(-1));
  return p;
}

/// The arguments of the backward pass as the kernels read them.
struct BackwardInputs {
  Tensor grad_out, out, lse, row_terms;

  BackwardInputs(const Tensor& of_grad_out, const Tensor& of_out, const Tensor& of_lse)
      : grad_out(aligned(of_grad_out)),
        out(aligned(of_out)),
        lse(of_lse),
        row_terms(at::empty({2 * of_lse.numel()}, of_lse.options())) {}

  void put(const AlibiAttention& call, AttentionBackwardProblem& p) const {
    p.grad_out = grad_out.const_data_ptr();
    p.out = out.const_data_ptr();
    p.grad_out_strides = head_strides(grad_out);
    p.out_strides = head_strides(out);
    p.lse = lse.const_data_ptr<float>();
    p.lse_strides = row_strides(lse);
    p.row_terms = row_terms.mutable_data_ptr<float>();
    p.row_terms_strides =
        call.packed() ? RowStrides{0, p.q_tokens, 1} : RowStrides{call.q_heads * call.q_len, call.q_len, 1};
  }
};

}  // namespace

std::string why_not_tiled(const AlibiAttention& call, const AttentionTensors& inputs) {
  const Tensor& q = inputs.q;
  if (q.scalar_type() != at::kHalf && q.scalar_type() != at::kBFloat16) {
    return "the kernels of attention take float16 and bfloat16";
  }
  if (!has_attention_kernels()) {
    return "the kernels of attention need compute capability 8.0 or later, and a library that is compiled for it";
  }
  if (call.head_dim > kMaxAttentionHeadDim) {
    return text("the kernels of attention take at most ", kMaxAttentionHeadDim, " channels");
  }
  if (call.q_heads > kMaxGridY || (!call.packed() && call.batch > kMaxGridY)) {
    return "there are more than 65,535 sequences or heads";
  }
  if (std::max(call.q_len, call.k_len) > kMaxLength || std::abs(call.query_offset.value_or(0)) > kMaxLength) {
    return text("the kernels of attention take at most ", kMaxLength, " positions");
  }
  return {};
}

std::tuple<Tensor, Tensor> tiled_attention(const AlibiAttention& call, const AttentionTensors& inputs) {
  const Tensor out = result_like(inputs.q, call);
  const auto real = inputs.q.options().dtype(at::kFloat);
  const Tensor lse = call.packed() ? at::empty({inputs.q.size(0), call.q_heads}, real).t()
                                   : at::empty({call.batch, call.q_heads, call.q_len}, real);
  if (call.packed() || has_no_work(call, inputs.q)) {
    lse.fill_(-std::numeric_limits<double>::infinity());
  }
  if (!has_no_work(call, inputs.q)) {
    const Inputs x(call, inputs);
    auto p = problem_of<AttentionForwardProblem>(call, x);
    p.out = out.mutable_data_ptr();
    p.out_strides = head_strides(out);
    p.lse = lse.mutable_data_ptr<float>();
    p.lse_strides = row_strides(lse);
    attention_forward(p, dtype_of(x.q.scalar_type()));
  }
  return {as_result(out, inputs.q), lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> tiled_attention_backward(
    const AlibiAttention& call,
    const AttentionBackwardArguments& arguments,
    bool slopes_grad) {
  const auto& [grad_out, grad_lse, q, k, v, slopes, out, lse] = arguments;
  const auto real = q.options().dtype(at::kFloat);
  const Tensor grad_q = result_like(q, call);
  const Tensor grad_k = result_like(k, call);
  const Tensor grad_v = result_like(v, call);
  if (call.batch == 0 || call.q_heads == 0 || call.head_dim == 0) {
    return {
        at::zeros_like(q), at::zeros_like(k), at::zeros_like(v),
        slopes_grad ? at::zeros(slopes->sizes(), real) : Tensor()};
  }
  const Inputs x(call, arguments.inputs());
  const BackwardInputs given(grad_out, out, lse);
  auto p = problem_of<AttentionBackwardProblem>(call, x);
  given.put(call, p);
  if (grad_lse.has_value()) {
    p.grad_lse = grad_lse->const_data_ptr<float>();
    p.grad_lse_strides = row_strides(*grad_lse);
  }
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  p.grad_q_strides = head_strides(grad_q);
  p.grad_k_strides = head_strides(grad_k);
  p.grad_v_strides = head_strides(grad_v);
  Tensor grad_slopes;
  if (slopes_grad) {
    grad_slopes = at::empty(slopes->sizes(), real);
    p.grad_slopes = grad_slopes.mutable_data_ptr<float>();
  }
  attention_backward(p, dtype_of(x.q.scalar_type()));
  return {as_result(grad_q, q), as_result(grad_k, k), as_result(grad_v, v), grad_slopes};
}

Tensor tiled_attention_slope_sums(const AlibiAttention& call, const AttentionSlopeSumsArguments& arguments) {
  const auto& [grad_out, q, k, v, slopes, lse] = arguments;
  Tensor result = at::empty({4, call.batch, call.q_heads, call.q_len}, q.options().dtype(at::kDouble));
  if (result.numel() == 0) {
    return result;
  }
  const Inputs x(call, arguments.inputs());
  // delta is not read: any tensor of the shape of `out` serves.
  const BackwardInputs given(grad_out, q, lse);
  auto p = problem_of<AttentionBackwardProblem>(call, x);
  given.put(call, p);
  p.row_sums = result.mutable_data_ptr<double>();
  attention_backward(p, dtype_of(x.q.scalar_type()));
  return result;
}

}  // namespace posenc::cuda
