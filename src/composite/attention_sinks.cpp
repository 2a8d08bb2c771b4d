#include <ops/alibi_attention.h>
#include <ops/dispatch.h>

#include <ATen/TensorOperators.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/sigmoid.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

namespace posenc {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> attention_sinks(const AttentionSinksArguments& arguments) {
  arguments::check_attention_sinks("posenc::attention_sinks", arguments);
  const auto& [out, lse, sinks] = arguments;
  const Tensor sink = sinks.to(lse.scalar_type()).unsqueeze(-1);
  // Sigmoids have finite derivatives of all orders where lse is minus infinity.
  const Tensor share = at::sigmoid(lse - sink);
  const Tensor factor = (out.dim() == 4 ? share.transpose(1, 2) : share.t()).unsqueeze(-1);
  // `out`, [B, Sq, Hq, D] or [T, Hq, D], may be an expanded tensor with strides of 0. The product of such a tensor in
  // 16 bits and `factor` in float32 has other strides on CUDA than on Meta, so `out` is converted first. log_sigmoid on
  // a CPU returns a contiguous tensor for any argument, Meta one with the strides of the argument; these are the same
  // for a contiguous argument.
  return {
      (out.to(lse.scalar_type()) * factor).to(out.scalar_type()), sink - at::log_sigmoid((sink - lse).contiguous())};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CompositeImplicitAutograd, m) {
  m.impl("attention_sinks", kernel<attention_sinks>);
}

}  // namespace posenc
