#include <functorch/loop_over_batch.h>

#include <ATen/functorch/BatchedTensorImpl.h>
#include <ATen/functorch/DynamicLayer.h>
#include <ATen/functorch/PlumbingHelper.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace posenc {
namespace {

using at::IValue;
using at::Tensor;

/// The innermost level of torch.func.vmap.
class FunctorchLevel {
 public:
  explicit FunctorchLevel(c10::ArrayRef<IValue> /*arguments*/)
      : level_(at::functorch::maybeCurrentDynamicLayer().value().layerId()) {}

  /// `tensor` with its batch dimension first; nullopt if it has none at this level.
  std::optional<Tensor> unwrapped(const Tensor& tensor) const {
    const auto [value, dim] = at::functorch::unwrapTensorAtLevel(tensor, level_);
    return dim.has_value() ? std::optional<Tensor>(value.movedim(*dim, 0)) : std::nullopt;
  }

  /// Makes the first dimension of `tensor` the batch dimension of this level.
  Tensor wrapped(const Tensor& tensor) const { return at::functorch::makeBatched(tensor, 0, level_); }

 private:
  int64_t level_;
  c10::impl::ExcludeDispatchKeyGuard below_vmap_{c10::DispatchKey::FuncTorchBatched};
};

}  // namespace

TORCH_LIBRARY_IMPL(posenc, FuncTorchBatched, m) {
  functorch::implement<FunctorchLevel>(m);
}

}  // namespace posenc
