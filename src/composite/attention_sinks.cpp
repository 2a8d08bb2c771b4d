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
  // The layout of a product of two dtypes differs between Meta and CUDA if out has strides of 0. On a CPU log_sigmoid
  // returns a contiguous tensor, where Meta promises the layout of the argument.
  return {
      (out.to(lse.scalar_type()) * factor).to(out.scalar_type()), sink - at::log_sigmoid((sink - lse).contiguous())};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CompositeImplicitAutograd, m) {
  m.impl("attention_sinks", kernel<attention_sinks>);
}

}  // namespace posenc
