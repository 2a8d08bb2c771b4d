#include "rotary_embedding_qkv_support.h"

#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

namespace posenc::test {

Packed make_packed(const RotaryCase& c, bool stacked, const Target& target, Strides strides) {
  const int64_t kv_heads = stacked ? c.q_heads : c.k_heads;
  // Both forms are consecutive heads of q, k and v, so `strides` applies to [.., heads, channels].
  const at::Tensor heads = random_tensor(c.sizes(c.q_heads + 2 * kv_heads), target, strides);
  const at::Tensor qkv = stacked  ? heads.unflatten(-2, {3, c.q_heads})
      : strides == Strides::dense ? heads.flatten(-2)
                                  : random_tensor(heads.sizes(), target, strides).flatten(-2);
  return {make_inputs(c, target), qkv, c.q_heads, kv_heads, stacked};
}

Parts split(const Packed& p, const at::Tensor& qkv) {
  const RotaryInputs& in = p.in;
  return posenc::rotary_embedding_qkv(
      qkv, p.q_heads, p.kv_heads, in.cos, in.sin, in.positions, in.interleaved, in.conjugate, in.pair_axes);
}

at::Tensor pack(const Packed& p, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const RotaryInputs& in = p.in;
  return posenc::rotary_embedding_pack(
      q, k, v, in.cos, in.sin, in.positions, p.stacked, in.interleaved, in.conjugate, in.pair_axes);
}

Packed backwards(const Packed& p) {
  Packed back = p;
  back.in = backwards(p.in);
  return back;
}

Parts views(const Packed& p, const at::Tensor& qkv) {
  const at::Tensor heads = p.stacked ? qkv.flatten(-3, -2) : qkv.unflatten(-1, {p.q_heads + 2 * p.kv_heads, -1});
  return {
      heads.narrow(-2, 0, p.q_heads), heads.narrow(-2, p.q_heads, p.kv_heads),
      heads.narrow(-2, p.q_heads + p.kv_heads, p.kv_heads)};
}

at::Tensor joined(const Packed& p, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const at::Tensor heads = at::cat({q, k, v}, -2);
  return p.stacked ? heads.unflatten(-2, {3, p.q_heads}) : heads.flatten(-2);
}

std::vector<RotaryCase> packed_cases() {
  std::vector<RotaryCase> cases;
  const auto add = [&cases](const std::string& name, const std::function<void(RotaryCase&)>& change) {
    RotaryCase c;
    c.name = name;
    c.tokens = 3;
    change(c);
    cases.push_back(c);
  };
  add("Default", [](RotaryCase&) {});
  add("Conjugate", [](RotaryCase& c) { c.conjugate = true; });
  add("Interleaved", [](RotaryCase& c) { c.interleaved = true; });
  add("Partial", [](RotaryCase& c) { c.head_dim = 24; });
  add("PartialInterleaved", [](RotaryCase& c) { c.head_dim = 40, c.interleaved = true; });
  add("OddHead", [](RotaryCase& c) { c.head_dim = 7, c.rotary_dim = 6, c.interleaved = true; });
  add("OnePair", [](RotaryCase& c) { c.head_dim = c.rotary_dim = 2; });
  add("Head128", [](RotaryCase& c) { c.head_dim = c.rotary_dim = 128, c.tokens = 5; });
  add("Head72", [](RotaryCase& c) { c.head_dim = c.rotary_dim = 72; });
  add("Packed", [](RotaryCase& c) { c.packed = true; });
  add("PackedPositions", [](RotaryCase& c) { c.packed = true, c.positions = PositionShape::per_token; });
  add("Positions", [](RotaryCase& c) { c.positions = PositionShape::per_batch, c.position_dtype = at::kInt; });
  add("Axes", [](RotaryCase& c) { c.positions = PositionShape::per_batch, c.axes = 3; });
  add("AxesCycledPartial", [](RotaryCase& c) {
    c.positions = PositionShape::per_batch, c.axes = 3, c.pair_axes = PairAxes::cycled, c.head_dim = 24;
  });
  add("TablesPerToken", [](RotaryCase& c) { c.tables = TableShape::per_token; });
  add("OneKeyHead", [](RotaryCase& c) { c.q_heads = 7, c.k_heads = 1; });
  return cases;
}

}  // namespace posenc::test
