#include <contract/rotary_embedding_tables_backward.h>

#include <contract/rotary_embedding.h>

#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>

namespace posenc::contract {

using at::Tensor;

void check_rotary_tables(const RotaryTablesArguments& a) {
  TORCH_CHECK(
      a.grads.size() == a.inputs.size() && (a.inputs.size() == 1 || a.inputs.size() == 2), a.op,
      ": expected one or two inputs and as many grads, got ", a.inputs.size(), " and ", a.grads.size());
  const RotaryArguments rotary{a.op, a.table, a.table, a.positions, a.interleaved, a.conjugate, a.pair_axes};
  const Rotated second{"inputs[1]", a.inputs.back()};
  check_rotary(rotary, {"inputs[0]", a.inputs[0]}, a.inputs.size() == 2 ? &second : nullptr);
  for (size_t i = 0; i < a.inputs.size(); ++i) {
    const Tensor& grad = a.grads[i];
    const Tensor& input = a.inputs[i];
    TORCH_CHECK(
        grad.defined() && grad.sizes() == input.sizes() && grad.scalar_type() == input.scalar_type() &&
            grad.device() == input.device(),
        a.op, ": expected grads[", i, "] of the shape, dtype and device of inputs[", i, "], ", input.sizes(), " ",
        input.scalar_type(), " ", input.device(), ", got ",
        grad.defined() ? c10::str(grad.sizes(), " ", grad.scalar_type(), " ", grad.device()) : "an undefined tensor");
  }
}

RotaryTablesCall rotary_tables_call(const RotaryTablesArguments& a) {
  check_rotary_tables(a);
  RotaryTablesCall call;
  call.grad_cos = at::empty_like(a.table, at::MemoryFormat::Contiguous);
  call.grad_sin = at::empty_like(call.grad_cos);

  RotaryTablesProblem& problem = call.problem;
  problem = {};
  const Tensor& first = a.inputs[0];
  const int64_t batch = batch_of(first);
  problem.seq_len = seq_len_of(first);
  problem.tokens = batch * problem.seq_len;
  problem.num_pairs = a.table.size(-1);
  problem.table_rows = a.table.numel() / problem.num_pairs;
  problem.num_operands = static_cast<int32_t>(a.inputs.size());
  for (size_t i = 0; i < a.inputs.size(); ++i) {
    problem.operands[i] = {
        a.grads[i].const_data_ptr(), a.inputs[i].const_data_ptr(), strides_of(a.grads[i]), strides_of(a.inputs[i]),
        a.inputs[i].size(-2)};
  }
  if (a.positions.has_value()) {
    problem.num_axes = a.pair_axes.empty() ? 1 : a.positions->size(0);
    const bool per_token = a.positions->dim() == (a.pair_axes.empty() ? 1 : 2);
    const Tensor flat = a.positions->reshape({problem.num_axes, per_token ? 1 : batch, problem.seq_len})
                            .expand({problem.num_axes, batch, problem.seq_len})
                            .reshape({problem.num_axes, problem.tokens});
    // Stable, so that the order of the sum, and with it its last bit, is the same every time.
    const auto [sorted, order] = at::sort(flat, /*stable=*/true, /*dim=*/1, /*descending=*/false);
    call.order = order.contiguous();
    const Tensor rows = at::arange(problem.table_rows + 1, sorted.options()).repeat({problem.num_axes, 1});
    call.row_starts = at::searchsorted(sorted.contiguous(), rows);
    problem.order = call.order.const_data_ptr<int64_t>();
    problem.row_starts = call.row_starts.const_data_ptr<int64_t>();
  } else {
    const bool per_token = a.table.dim() == 3 && a.table.size(0) == batch;
    problem.tokens_per_row = per_token ? 1 : batch;
    problem.rows_read = per_token ? batch * problem.seq_len : problem.seq_len;
  }
  problem.grad_cos = call.grad_cos.mutable_data_ptr();
  problem.grad_sin = call.grad_sin.mutable_data_ptr();
  problem.interleaved = a.interleaved;
  problem.conjugate = a.conjugate;
  problem.pair_axes = packed_pair_axes(a.pair_axes);
  return call;
}

}  // namespace posenc::contract
