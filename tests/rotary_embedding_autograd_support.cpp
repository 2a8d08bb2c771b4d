#include "rotary_embedding_autograd_support.h"

#include <ATen/ATen.h>

namespace posenc::test {

std::vector<RotaryCase> small_rotary_cases() {
  std::vector<RotaryCase> cases;
  const auto add = [&cases](const std::string& name, const std::function<void(RotaryCase&)>& change) {
    RotaryCase c;
    c.name = name;
    c.tokens = 3;
    c.q_heads = 2;
    c.k_heads = 1;
    c.head_dim = 6;
    c.rotary_dim = 4;
    c.spare_rows = 1;
    change(c);
    cases.push_back(c);
  };
  add("NoPositions", [](RotaryCase&) {});
  add("Interleaved", [](RotaryCase& c) { c.interleaved = true; });
  add("Conjugate", [](RotaryCase& c) { c.conjugate = true; });
  add("FullWidth", [](RotaryCase& c) { c.head_dim = 4; });
  add("Packed", [](RotaryCase& c) { c.packed = true; });
  add("PackedPositions", [](RotaryCase& c) {
    c.packed = true;
    c.positions = PositionShape::per_token;
  });
  // Five tokens and two rows, so a row is read several times.
  add("PositionsPerTokenRepeated", [](RotaryCase& c) {
    c.tokens = 5;
    c.spare_rows = -3;
    c.positions = PositionShape::per_token;
    c.position_dtype = at::kInt;
  });
  add("PositionsPerBatch", [](RotaryCase& c) { c.positions = PositionShape::per_batch; });
  add("Axes", [](RotaryCase& c) {
    c.positions = PositionShape::per_batch;
    c.axes = 2;
  });
  add("AxesPackedRepeated", [](RotaryCase& c) {
    c.packed = true;
    c.tokens = 5;
    c.spare_rows = -3;
    c.positions = PositionShape::per_token;
    c.axes = 3;
    c.pair_axes = PairAxes::cycled;
    c.interleaved = true;
  });
  add("TablesPerToken", [](RotaryCase& c) { c.tables = TableShape::per_token; });
  add("TablesPerTokenShared", [](RotaryCase& c) { c.tables = TableShape::per_token_shared; });
  add("StridedTables", [](RotaryCase& c) { c.table_strides = TableStrides::transposed; });
  add("StridedInputs", [](RotaryCase& c) {
    c.q_strides = Strides::head_slice;
    c.k_strides = Strides::one_head;
    c.interleaved = true;
  });
  return cases;
}

RotaryInputs with_grad(const RotaryInputs& inputs, bool q, bool k, bool cos, bool sin) {
  RotaryInputs in = inputs;
  in.q = inputs.q.detach().requires_grad_(q);
  in.k = inputs.k.detach().requires_grad_(k);
  in.cos = inputs.cos.detach().requires_grad_(cos);
  in.sin = inputs.sin.detach().requires_grad_(sin);
  return in;
}

}  // namespace posenc::test
