#include "eager_rotary_embedding.h"

#include <ATen/ATen.h>

#include <utility>

namespace posenc::bench {
namespace {

/// Inserts dimensions of size 1 for batch and heads into `table` `[S, W]`.
at::Tensor broadcast_over_heads(const at::Tensor& table, int64_t sequence_dim) {
  return table.unsqueeze(0).unsqueeze(sequence_dim == 1 ? 2 : 1);
}

/// cos and sin as a model keeps them: in its dtype, ready to broadcast.
std::pair<at::Tensor, at::Tensor> model_tables(const EagerTables& tables) {
  return {
      broadcast_over_heads(tables.cos.to(tables.dtype), tables.sequence_dim),
      broadcast_over_heads(tables.sin.to(tables.dtype), tables.sequence_dim)};
}

/// Rotates the first `2 * cos.size(-1)` channels by `rotate` and copies the others.
EagerRotation with_tail(const EagerTables& tables, EagerRotation rotate) {
  return [rotary_dim = 2 * tables.cos.size(-1), rotate = std::move(rotate)](const at::Tensor& x) {
    const int64_t tail = x.size(-1) - rotary_dim;
    return tail == 0 ? rotate(x) : at::cat({rotate(x.narrow(-1, 0, rotary_dim)), x.narrow(-1, rotary_dim, tail)}, -1);
  };
}

// Half pairing: split, rotate, concatenate (GPT-NeoX, FlashAttention's reference).
EagerRotation make_split(const EagerTables& tables) {
  const auto [cos, sin] = model_tables(tables);
  return with_tail(tables, [cos = cos, sin = sin](const at::Tensor& x) {
    const auto halves = x.chunk(2, -1);
    return at::cat({halves[0] * cos - halves[1] * sin, halves[0] * sin + halves[1] * cos}, -1);
  });
}

// Half pairing: x cos + rotate_half(x) sin with tables of full width (Llama in Hugging Face transformers).
EagerRotation make_rotate_half(const EagerTables& tables) {
  const auto [half_cos, half_sin] = model_tables(tables);
  return with_tail(
      tables, [cos = at::cat({half_cos, half_cos}, -1), sin = at::cat({half_sin, half_sin}, -1)](const at::Tensor& x) {
        const auto halves = x.chunk(2, -1);
        return x * cos + at::cat({-halves[1], halves[0]}, -1) * sin;
      });
}

// Interleaved pairing: even and odd channels, rotated and stacked (RoFormer).
EagerRotation make_stack(const EagerTables& tables) {
  const auto [cos, sin] = model_tables(tables);
  return with_tail(tables, [cos = cos, sin = sin](const at::Tensor& x) {
    const auto even = x.slice(-1, 0, std::nullopt, 2);
    const auto odd = x.slice(-1, 1, std::nullopt, 2);
    return at::stack({even * cos - odd * sin, even * sin + odd * cos}, -1).flatten(-2);
  });
}

// Interleaved pairing: x cos + rotate_every_two(x) sin with tables of full width (GPT-J in Hugging Face transformers).
EagerRotation make_rotate_every_two(const EagerTables& tables) {
  const auto [half_cos, half_sin] = model_tables(tables);
  return with_tail(
      tables, [cos = half_cos.repeat_interleave(2, -1), sin = half_sin.repeat_interleave(2, -1)](const at::Tensor& x) {
        const auto even = x.slice(-1, 0, std::nullopt, 2);
        const auto odd = x.slice(-1, 1, std::nullopt, 2);
        return x * cos + at::stack({-odd, even}, -1).flatten(-2) * sin;
      });
}

// Interleaved pairing: complex multiplication in float32 (Meta's Llama).
EagerRotation make_complex(const EagerTables& tables) {
  const auto rotation = broadcast_over_heads(at::complex(tables.cos, tables.sin), tables.sequence_dim);
  return with_tail(tables, [rotation](const at::Tensor& x) {
    const auto pairs = at::view_as_complex(x.to(at::kFloat).unflatten(-1, {-1, 2}));
    return at::view_as_real(pairs * rotation).flatten(-2).to(x.scalar_type());
  });
}

}  // namespace

std::vector<EagerFormulation> eager_rotary_embeddings(bool interleaved) {
  if (interleaved) {
    return {{"stack", make_stack}, {"rotate_every_two", make_rotate_every_two}, {"complex", make_complex}};
  }
  return {{"split", make_split}, {"rotate_half", make_rotate_half}};
}

}  // namespace posenc::bench
