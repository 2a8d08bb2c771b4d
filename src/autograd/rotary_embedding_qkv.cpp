#include <autograd/detail/node.h>
#include <autograd/detail/record.h>
#include <contract/rotary_embedding_qkv.h>
#include <ops/rotary_embedding_tables_backward.h>
#include <posenc/rotary_embedding.h>

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <array>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

namespace posenc {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// What both directions save, and how they were called.
struct Saved {
  Saved() = default;
  Saved(
      const Tensor& cos_table,
      const Tensor& sin_table,
      const std::optional<Tensor>& of_tokens,
      int64_t num_q_heads,
      int64_t num_kv_heads,
      bool is_stacked,
      bool is_interleaved,
      bool is_conjugate,
      at::IntArrayRef axes)
      : cos(cos_table, /*is_output=*/false),
        sin(sin_table, /*is_output=*/false),
        positions(of_tokens, /*is_output=*/false),
        q_heads(num_q_heads),
        kv_heads(num_kv_heads),
        stacked(is_stacked),
        interleaved(is_interleaved),
        conjugate(is_conjugate),
        pair_axes(axes.vec()) {}

  auto state() { return std::tie(cos, sin, positions, q_heads, kv_heads, stacked, interleaved, conjugate, pair_axes); }

  SavedVariable cos, sin, positions;
  int64_t q_heads = 0;
  int64_t kv_heads = 0;
  bool stacked = false;
  bool interleaved = false;
  bool conjugate = false;
  std::vector<int64_t> pair_axes;
};

/// The gradients to cos and sin of what was rotated, q and k, of those whose gradient is there.
std::tuple<Tensor, Tensor> table_gradients(
    const std::array<Tensor, 2>& output_grads,
    const std::array<Tensor, 2>& inputs,
    const Tensor& cos,
    const std::optional<Tensor>& positions,
    const Saved& saved) {
  variable_list grads;
  variable_list rotated;
  for (size_t i = 0; i < 2; ++i) {
    if (output_grads[i].defined()) {
      grads.push_back(output_grads[i]);
      rotated.push_back(inputs[i]);
    }
  }
  if (grads.empty()) {
    return {};
  }
  return rotary_embedding_tables_backward(
      grads, rotated, cos, positions, saved.interleaved, saved.conjugate, saved.pair_axes);
}

/// The gradient of the packed projection is those of its parts, q and k rotated backwards, packed again. Saves the
/// projection only where the tables need a gradient.
class RotaryEmbeddingQkvBackward final : public autograd::Node<RotaryEmbeddingQkvBackward> {
 public:
  RotaryEmbeddingQkvBackward() = default;
  RotaryEmbeddingQkvBackward(const Tensor& qkv, bool saves_input, Saved saved) : saved_(std::move(saved)) {
    if (saves_input) {
      qkv_ = SavedVariable(qkv, /*is_output=*/false);
    }
  }

  auto state() { return std::tuple_cat(saved_.state(), std::tie(qkv_)); }

  variable_list differentiate(const variable_list& grads) {
    const Tensor cos = unpack(saved_.cos);
    const Tensor sin = unpack(saved_.sin);
    const auto positions = unpack_optional(saved_.positions);
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
      result[0] = rotary_embedding_pack(
          grad_or_zeros(grads[0], saved_.q_heads), grad_or_zeros(grads[1], saved_.kv_heads),
          grad_or_zeros(grads[2], saved_.kv_heads), cos, sin, positions, saved_.stacked, saved_.interleaved,
          !saved_.conjugate, saved_.pair_axes);
    }
    if (wants(1, 3)) {
      const contract::PackedViews inputs =
          contract::packed_views("posenc::rotary_embedding_qkv", "qkv", unpack(qkv_), saved_.q_heads, saved_.kv_heads);
      std::tie(result[1], result[2]) =
          table_gradients({grads[0], grads[1]}, {inputs.q, inputs.k}, cos, positions, saved_);
    }
    return result;
  }

  std::string name() const override { return "RotaryEmbeddingQkvBackward"; }

 private:
  Saved saved_;
  SavedVariable qkv_;
};

/// And the other way round.
class RotaryEmbeddingPackBackward final : public autograd::Node<RotaryEmbeddingPackBackward> {
 public:
  RotaryEmbeddingPackBackward() = default;
  RotaryEmbeddingPackBackward(const Tensor& q, const Tensor& k, bool saves_inputs, Saved saved)
      : saved_(std::move(saved)) {
    if (saves_inputs) {
      q_ = SavedVariable(q, /*is_output=*/false);
      k_ = SavedVariable(k, /*is_output=*/false);
    }
  }

  auto state() { return std::tuple_cat(saved_.state(), std::tie(q_, k_)); }

  variable_list differentiate(const variable_list& grads) {
    const Tensor cos = unpack(saved_.cos);
    const Tensor sin = unpack(saved_.sin);
    const auto positions = unpack_optional(saved_.positions);
    variable_list result(5);
    if (!grads[0].defined()) {
      return result;
    }
    if (wants(0, 3)) {
      std::tie(result[0], result[1], result[2]) = rotary_embedding_qkv(
          grads[0], saved_.q_heads, saved_.kv_heads, cos, sin, positions, saved_.interleaved, !saved_.conjugate,
          saved_.pair_axes);
    }
    if (wants(3, 5)) {
      const contract::PackedViews output_grads =
          contract::packed_views("posenc::rotary_embedding_pack", "grad", grads[0], saved_.q_heads, saved_.kv_heads);
      std::tie(result[3], result[4]) =
          table_gradients({output_grads.q, output_grads.k}, {unpack(q_), unpack(k_)}, cos, positions, saved_);
    }
    return result;
  }

  std::string name() const override { return "RotaryEmbeddingPackBackward"; }

 private:
  Saved saved_;
  SavedVariable q_, k_;
};

std::tuple<Tensor, Tensor, Tensor> rotary_embedding_qkv_autograd(
    const Tensor& qkv,
    int64_t num_q_heads,
    int64_t num_kv_heads,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const std::array<std::reference_wrapper<const Tensor>, 3> differentiable{qkv, cos, sin};
  for (const Tensor& tensor : differentiable) {
    autograd::check_no_tangent("posenc::rotary_embedding_qkv", tensor);
  }
  auto outputs = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return rotary_embedding_qkv(qkv, num_q_heads, num_kv_heads, cos, sin, positions, interleaved, conjugate, pair_axes);
  }();
  if (autograd::any_requires_grad(differentiable)) {
    const auto node = autograd::make_node<RotaryEmbeddingQkvBackward>(
        differentiable, qkv, cos.requires_grad() || sin.requires_grad(),
        Saved(
            cos, sin, positions, num_q_heads, num_kv_heads, contract::is_stacked(qkv.dim()), interleaved, conjugate,
            pair_axes));
    torch::autograd::set_history(std::get<0>(outputs), node);
    torch::autograd::set_history(std::get<1>(outputs), node);
    torch::autograd::set_history(std::get<2>(outputs), node);
  }
  return outputs;
}

/// A number in every graph: only the lengths of sequences are symbols there.
int64_t num_heads(const Tensor& x) {
  return x.sym_size(-2).guard_int(__FILE__, __LINE__);
}

Tensor rotary_embedding_pack_autograd(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool stacked,
    bool interleaved,
    bool conjugate,
    at::IntArrayRef pair_axes) {
  const std::array<std::reference_wrapper<const Tensor>, 5> differentiable{q, k, v, cos, sin};
  for (const Tensor& tensor : differentiable) {
    autograd::check_no_tangent("posenc::rotary_embedding_pack", tensor);
  }
  const Tensor packed = [&] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return rotary_embedding_pack(q, k, v, cos, sin, positions, stacked, interleaved, conjugate, pair_axes);
  }();
  if (autograd::any_requires_grad(differentiable)) {
    const auto node = autograd::make_node<RotaryEmbeddingPackBackward>(
        differentiable, q, k, cos.requires_grad() || sin.requires_grad(),
        Saved(cos, sin, positions, num_heads(q), num_heads(k), stacked, interleaved, conjugate, pair_axes));
    torch::autograd::set_history(packed, node);
  }
  return packed;
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, Autograd, m) {
  m.impl("rotary_embedding_qkv", rotary_embedding_qkv_autograd);
  m.impl("rotary_embedding_pack", rotary_embedding_pack_autograd);
}

}  // namespace posenc
