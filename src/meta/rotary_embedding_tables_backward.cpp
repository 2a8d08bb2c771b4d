#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace posenc {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> rotary_embedding_tables_backward_meta(
    at::TensorList /*grads*/,
    at::TensorList /*inputs*/,
    const Tensor& table,
    const std::optional<Tensor>& /*positions*/,
    bool /*interleaved*/,
    bool /*conjugate*/,
    at::IntArrayRef /*pair_axes*/) {
  return {at::empty_like(table, at::MemoryFormat::Contiguous), at::empty_like(table, at::MemoryFormat::Contiguous)};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Meta, m) {
  m.impl("rotary_embedding_tables_backward", rotary_embedding_tables_backward_meta);
}

}  // namespace posenc
