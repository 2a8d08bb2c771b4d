#include <contract/rotary_embedding_backward.h>

#include <contract/rotary_embedding.h>

namespace posenc::contract {

RotaryBackwardCall rotary_backward_call(const RotaryBackwardArguments& a) {
  constexpr const char* op = "posenc::rotary_embedding_backward";
  const RotaryTablesArguments of_tables{op, a.grads, a.inputs, a.cos, a.positions, a.interleaved, a.conjugate, {}};
  check_rotary_tables(of_tables);
  RotaryBackwardCall call;
  const Rotated second{"grads[1]", a.grads.back()};
  RotaryProblem rotation = rotary_problem(
      {op, a.cos, a.sin, a.positions, a.interleaved, !a.conjugate, {}}, {"grads[0]", a.grads[0]},
      a.grads.size() == 2 ? &second : nullptr);
  for (size_t i = 0; i < a.grads.size(); ++i) {
    call.input_grads.push_back(allocate_output(a.grads[i], rotation.operands[i]));
  }
  call.tables = rotary_tables_call(of_tables);
  call.problem = {call.tables.problem, rotation};
  return call;
}

}  // namespace posenc::contract
