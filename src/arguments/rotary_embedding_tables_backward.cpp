#include <arguments/rotary_embedding_tables_backward.h>

#include <arguments/rotary_embedding.h>

#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>

namespace posenc::arguments {
namespace {

using at::Tensor;

void check_rotary_tables(const char* op, const Rotation& rotation, at::TensorList grads, at::TensorList inputs) {
  TORCH_CHECK(
      grads.size() == inputs.size() && (inputs.size() == 1 || inputs.size() == 2), op,
      ": expected one or two inputs and as many grads, got ", inputs.size(), " and ", grads.size());
  const NamedTensor named_inputs[] = {{"inputs[0]", inputs.front()}, {"inputs[1]", inputs.back()}};
  const NamedTensor named_grads[] = {{"grads[0]", grads.front()}, {"grads[1]", grads.back()}};
  check_rotary(op, rotation, {named_inputs, inputs.size()});
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_like(op, named_grads[i], named_inputs[i]);
  }
}

/// Describes a call whose arguments have been checked.
RotaryTablesCall describe_rotary_tables(const Rotation& rotation, at::TensorList grads, at::TensorList inputs) {
  const Tensor& table = rotation.cos;
  RotaryTablesCall call;
  call.grad_cos = at::empty_like(table, at::MemoryFormat::Contiguous);
  call.grad_sin = at::empty_like(call.grad_cos);

  RotaryTablesProblem& problem = call.problem;
  problem = {};
  const Tensor& first = inputs[0];
  const int64_t batch = batch_of(first);
  problem.seq_len = seq_len_of(first);
  problem.tokens = batch * problem.seq_len;
  problem.num_pairs = table.size(-1);
  problem.table_rows = table.numel() / problem.num_pairs;
  problem.num_operands = static_cast<int32_t>(inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) {
    problem.operands[i] = {
        grads[i].const_data_ptr(), inputs[i].const_data_ptr(), strides_of(grads[i]), strides_of(inputs[i]),
        inputs[i].size(-2)};
  }
  if (rotation.positions.has_value()) {
    problem.num_axes = rotation.pair_axes.empty() ? 1 : rotation.positions->size(0);
    const bool per_token = rotation.positions->dim() == (rotation.pair_axes.empty() ? 1 : 2);
    const Tensor flat = rotation.positions->reshape({problem.num_axes, per_token ? 1 : batch, problem.seq_len})
                            .expand({problem.num_axes, batch, problem.seq_len})
                            .reshape({problem.num_axes, problem.tokens});
    // A stable sort, so that the order of the sum, and therefore its last bit, is the same every time.
    const auto [sorted, order] = at::sort(flat, /*stable=*/true, /*dim=*/1, /*descending=*/false);
    call.order = order.contiguous();
    const Tensor rows = at::arange(problem.table_rows + 1, sorted.options()).repeat({problem.num_axes, 1});
    call.row_starts = at::searchsorted(sorted.contiguous(), rows);
    problem.order = call.order.const_data_ptr<int64_t>();
    problem.row_starts = call.row_starts.const_data_ptr<int64_t>();
  } else {
    const bool per_token = table.dim() == 3 && table.size(0) == batch;
    problem.tokens_per_row = per_token ? 1 : batch;
    problem.rows_read = per_token ? batch * problem.seq_len : problem.seq_len;
  }
  problem.grad_cos = call.grad_cos.mutable_data_ptr();
  problem.grad_sin = call.grad_sin.mutable_data_ptr();
  problem.interleaved = rotation.interleaved;
  problem.conjugate = rotation.conjugate;
  problem.pair_axes = packed_pair_axes(rotation.pair_axes);
  return call;
}

}  // namespace

RotaryTablesCall rotary_tables_call(const Rotation& rotation, at::TensorList grads, at::TensorList inputs) {
  check_rotary_tables("posenc::rotary_embedding_tables_backward", rotation, grads, inputs);
  return describe_rotary_tables(rotation, grads, inputs);
}

RotaryBackwardCall rotary_backward_call(const Rotation& rotation, at::TensorList grads, at::TensorList inputs) {
  constexpr const char* kOp = "posenc::rotary_embedding_backward";
  check_rotary_tables(kOp, rotation, grads, inputs);
  const NamedTensor rotated[] = {{"grads[0]", grads.front()}, {"grads[1]", grads.back()}};
  RotaryProblem rotation_problem = describe_rotary(kOp, rotation.inverse(), {rotated, grads.size()});
  RotaryBackwardCall call;
  for (size_t i = 0; i < grads.size(); ++i) {
    call.input_grads.push_back(allocate_output(grads[i], rotation_problem.operands[i]));
  }
  call.tables = describe_rotary_tables(rotation, grads, inputs);
  call.problem = {call.tables.problem, rotation_problem};
  return call;
}

}  // namespace posenc::arguments
