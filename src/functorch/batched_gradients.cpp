#include <functorch/loop_over_batch.h>

#include <ATen/LegacyBatchedTensorImpl.h>
#include <ATen/ops/_add_batch_dim.h>
#include <ATen/ops/_remove_batch_dim.h>

// Not in vmap.cpp, because the headers of both kinds of vmap cannot be included together.
namespace posenc {
namespace {

using at::IValue;
using at::Tensor;

/// The highest level of the older vmap among the arguments. torch.autograd.grad(is_grads_batched=True) uses this vmap.
class LegacyLevel {
 public:
  explicit LegacyLevel(c10::ArrayRef<IValue> arguments) {
    const auto visit = [this](const Tensor& tensor) {
      if (tensor.defined() && at::isBatchedTensor(tensor)) {
        level_ = std::max(level_, at::unsafeGetBatchedImpl(tensor)->bdims().back().level());
      }
    };
    for (const IValue& argument : arguments) {
      if (argument.isTensor()) {
        visit(argument.toTensor());
      } else if (argument.isTensorList()) {
        for (const Tensor& tensor : argument.toTensorVector()) {
          visit(tensor);
        }
      }
    }
  }

  std::optional<Tensor> unwrapped(const Tensor& tensor) const {
    if (!tensor.defined() || !at::isBatchedTensor(tensor)) {
      return std::nullopt;
    }
    const at::BatchedTensorImpl& batched = *at::unsafeGetBatchedImpl(tensor);
    const at::BatchDim last = batched.bdims().back();
    if (last.level() != level_) {
      return std::nullopt;
    }
    return at::_remove_batch_dim(tensor, level_, batched.value().size(last.dim()), 0);
  }

  Tensor wrapped(const Tensor& tensor) const { return at::_add_batch_dim(tensor, 0, level_); }

 private:
  int64_t level_ = 0;
};

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Batched, m) {
  functorch::implement<LegacyLevel>(m);
}

}  // namespace posenc
