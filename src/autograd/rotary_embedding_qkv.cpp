#include <arguments/rotary_embedding_qkv.h>
#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <autograd/detail/saved_rotation.h>
#include <ops/dispatch.h>
#include <ops/rotary_embedding.h>

#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <utility>
#include <vector>

namespace posenc {
namespace {

using at::Tensor;
using autograd::SavedRotation;
using autograd::UnpackedRotation;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// The arguments that both nodes save, beside the inputs that only the gradients of the tables need.
struct Saved {
  Saved() = default;
  Saved(const Rotation& of_call, int64_t num_q_heads, int64_t num_kv_heads, bool is_stacked)
      : rotation(of_call), q_heads(num_q_heads), kv_heads(num_kv_heads), stacked(is_stacked) {}

  auto state() { return std::tie(rotation, q_heads, kv_heads, stacked); }

  SavedRotation rotation;
  int64_t q_heads = 0;
  int64_t kv_heads = 0;
  bool stacked = false;
};

/// The gradients of cos and sin from the gradients of q and k, which may be undefined.
std::tuple<Tensor, Tensor> table_gradients(
    const Rotation& rotation,
    const std::array<Tensor, 2>& output_grads,
    const std::array<Tensor, 2>& inputs) {
  variable_list grads;
  variable_list rotated;
  for (size_t i = 0; i < 2; ++i) {
    if (output_grads[i].defined()) {
      grads.push_back(output_grads[i]);
      rotated.push_back(inputs[i]);
    }
  }
  return grads.empty() ? std::tuple<Tensor, Tensor>()
                       : dispatch::rotary_embedding_tables_backward(rotation, grads, rotated);
}

/// The gradient of the packed projection is the packed gradients of q, k and v, those of q and k rotated by the
/// negative angles. The projection is saved only if the tables require a gradient.
class RotaryEmbeddingQkvBackward final : public autograd::Node<RotaryEmbeddingQkvBackward> {
 public:
  RotaryEmbeddingQkvBackward() = default;
  RotaryEmbeddingQkvBackward(const Rotation& rotation, const Tensor& qkv, int64_t num_q_heads, int64_t num_kv_heads)
      : saved_(rotation, num_q_heads, num_kv_heads, arguments::is_stacked(qkv.dim())) {
    if (autograd::tables_require_grad(rotation)) {
      qkv_ = SavedVariable(qkv, /*is_output=*/false);
    }
  }

  auto state() { return std::tie(saved_, qkv_); }

  variable_list differentiate(const variable_list& grads) {
    const UnpackedRotation rotation = saved_.rotation.unpack();
    variable_list result(3);
    const Tensor& some = grads[0].defined() ? grads[0] : grads[1].defined() ? grads[1] : grads[2];
    if (!some.defined()) {
      return result;
    }
    if (wants(0)) {
      const auto grad_or_zeros = [&some](const Tensor& grad, int64_t num_heads) {
        if (grad.defined()) {
          return grad;
        }
        auto sizes = some.sym_sizes().vec();
        sizes[sizes.size() - 2] = num_heads;
        return at::zeros_symint(sizes, some.options());
      };
      result[0] = dispatch::rotary_embedding_pack(
          {rotation.cos, rotation.sin, rotation.positions, saved_.stacked, rotation.interleaved, !rotation.conjugate,
           rotation.pair_axes},
          grad_or_zeros(grads[0], saved_.q_heads), grad_or_zeros(grads[1], saved_.kv_heads),
          grad_or_zeros(grads[2], saved_.kv_heads));
    }
    if (wants(1, 3)) {
      const arguments::PackedViews inputs =
          arguments::packed_views("posenc::rotary_embedding_qkv", "qkv", unpack(qkv_), saved_.q_heads, saved_.kv_heads);
      std::tie(result[1], result[2]) = table_gradients(rotation, {grads[0], grads[1]}, {inputs.q, inputs.k});
    }
    return result;
  }

 private:
  Saved saved_;
  SavedVariable qkv_;
};

/// Numbers of heads are never symbols in a traced graph: only sequence lengths are.
int64_t num_heads(const Tensor& x) {
  return x.sym_size(-2).guard_int(__FILE__, __LINE__);
}

/// The gradients of q, k and v are those of the packed tensor, unpacked; those of q and k are rotated back. q and k are
/// saved only if the tables require a gradient.
class RotaryEmbeddingPackBackward final : public autograd::Node<RotaryEmbeddingPackBackward> {
 public:
  RotaryEmbeddingPackBackward() = default;
  RotaryEmbeddingPackBackward(const PackRotation& rotation, const Tensor& q, const Tensor& k)
      : saved_(rotation.rotation(), num_heads(q), num_heads(k), rotation.stacked) {
    if (autograd::tables_require_grad(rotation.rotation())) {
      q_ = SavedVariable(q, /*is_output=*/false);
      k_ = SavedVariable(k, /*is_output=*/false);
    }
  }

  auto state() { return std::tie(saved_, q_, k_); }

  variable_list differentiate(const variable_list& grads) {
    const UnpackedRotation rotation = saved_.rotation.unpack();
    variable_list result(5);
    if (!grads[0].defined()) {
      return result;
    }
    if (wants(0, 3)) {
      std::tie(result[0], result[1], result[2]) =
          dispatch::rotary_embedding_qkv(Rotation(rotation).inverse(), grads[0], saved_.q_heads, saved_.kv_heads);
    }
    if (wants(3, 5)) {
      const arguments::PackedViews output_grads =
          arguments::packed_views("posenc::rotary_embedding_pack", "grad", grads[0], saved_.q_heads, saved_.kv_heads);
      std::tie(result[3], result[4]) =
          table_gradients(rotation, {output_grads.q, output_grads.k}, {unpack(q_), unpack(k_)});
    }
    return result;
  }

 private:
  Saved saved_;
  SavedVariable q_, k_;
};

std::tuple<Tensor, Tensor, Tensor> rotary_embedding_qkv_autograd(
    const Rotation& rotation,
    const Tensor& qkv,
    int64_t num_q_heads,
    int64_t num_kv_heads) {
  return autograd::forward_and_record<RotaryEmbeddingQkvBackward>(
      "posenc::rotary_embedding_qkv", {qkv, rotation.cos, rotation.sin},
      [&] { return dispatch::rotary_embedding_qkv(rotation, qkv, num_q_heads, num_kv_heads); }, rotation, qkv,
      num_q_heads, num_kv_heads);
}

Tensor rotary_embedding_pack_autograd(const PackRotation& rotation, const Tensor& q, const Tensor& k, const Tensor& v) {
  return autograd::forward_and_record<RotaryEmbeddingPackBackward>(
      "posenc::rotary_embedding_pack", {q, k, v, rotation.cos, rotation.sin},
      [&] { return dispatch::rotary_embedding_pack(rotation, q, k, v); }, rotation, q, k);
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("rotary_embedding_qkv", kernel<rotary_embedding_qkv_autograd>);
  m.impl("rotary_embedding_pack", kernel<rotary_embedding_pack_autograd>);
}

}  // namespace posenc
