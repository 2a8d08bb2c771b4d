#include <arguments/overlap.h>
#include <arguments/rotary_embedding.h>
#include <arguments/tensor.h>

#include <posenc/detail/first_index.h>
#include <posenc/frequencies.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ops/aminmax.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/equal.h>
#include <c10/util/env.h>

#include <atomic>

namespace posenc {
namespace {

bool position_check_from_environment() {
  const auto value = c10::utils::get_env("POSENC_CHECK_POSITIONS");
  return value.has_value() && !value->empty() && *value != "0";
}

std::atomic<bool>& position_check_flag() {
  static std::atomic<bool> flag{position_check_from_environment()};
  return flag;
}

}  // namespace

void set_position_check(bool enabled) {
  position_check_flag().store(enabled, std::memory_order_relaxed);
}

bool position_check() {
  return position_check_flag().load(std::memory_order_relaxed);
}

namespace arguments {
namespace {

using at::Tensor;

bool is_packed(const Tensor& x) {
  return x.dim() == 3;
}

void check_rotated(const char* op, const NamedTensor& x) {
  check_defined(op, x.name, x.tensor);
  TORCH_CHECK(
      x.tensor.dim() == 4 || x.tensor.dim() == 3, op, ": expected ", x.name,
      " of shape [B, S, H, D] or [T, H, D], got ", x.tensor.sizes());
  check_served(op, x);
}

void check_pair(const char* op, const NamedTensor& q, const NamedTensor& k) {
  TORCH_CHECK(
      k.tensor.scalar_type() == q.tensor.scalar_type(), op, ": expected ", k.name, " of the dtype of ", q.name, ", ",
      q.tensor.scalar_type(), ", got ", k.tensor.scalar_type());
  check_device(op, k, q);
  bool same = k.tensor.dim() == q.tensor.dim();
  for (int64_t d = 0; same && d < q.tensor.dim(); ++d) {
    same = d == q.tensor.dim() - 2 || k.tensor.size(d) == q.tensor.size(d);
  }
  TORCH_CHECK(
      same, op, ": expected ", k.name, " to have the sizes of ", q.name, " in all but the head dimension, ",
      q.tensor.sizes(), ", got ", k.tensor.sizes());
}

void check_positions(const char* op, const Rotation& a, const NamedTensor& q) {
  const Tensor& positions = *a.positions;
  check_defined(op, "positions", positions);
  TORCH_CHECK(
      positions.scalar_type() == at::kInt || positions.scalar_type() == at::kLong, op,
      ": expected positions of dtype int32 or int64, got ", positions.scalar_type());
  check_device(op, {"positions", positions}, q);
  const int64_t batch = batch_of(q.tensor);
  const int64_t seq_len = seq_len_of(q.tensor);
  const bool packed = is_packed(q.tensor);
  const int64_t of_axes = a.pair_axes.empty() ? 0 : 1;  // number of dimensions before the token dimensions
  const bool per_token = positions.dim() == of_axes + 1 && positions.size(of_axes) == seq_len;
  const bool per_batch = !packed && positions.dim() == of_axes + 2 && positions.size(of_axes) == batch &&
      positions.size(of_axes + 1) == seq_len;
  const bool axes_fit = of_axes == 0 || (positions.size(0) >= 1 && positions.size(0) <= kMaxAxes);
  const char* axes = of_axes == 0 ? "" : "A, ";
  const bool has_axes = positions.dim() == (packed ? 2 : 3);
  TORCH_CHECK(
      (per_token || per_batch) && axes_fit, op, ": expected positions of shape ",
      packed
          ? c10::str("[", axes, "T] = [", axes, seq_len, "]")
          : c10::str("[", axes, "S] = [", axes, seq_len, "] or [", axes, "B, S] = [", axes, batch, ", ", seq_len, "]"),
      of_axes != 0   ? c10::str(" with pair_axes, of 1 to ", kMaxAxes, " axes")
          : has_axes ? " without pair_axes"
                     : "",
      ", got ", positions.sizes());
}

void check_pair_axes(const char* op, const Rotation& a) {
  if (a.pair_axes.empty()) {
    return;
  }
  TORCH_CHECK(
      a.cos.dim() == 2, op, ": expected no pair_axes with tables given per token, [B, S, R/2] = ", a.cos.sizes(),
      ", got ", a.pair_axes.size());
  TORCH_CHECK(a.positions.has_value(), op, ": expected positions, [A, S] or [A, B, S], with pair_axes, got none");
  const int64_t num_pairs = a.cos.size(-1);
  TORCH_CHECK(
      num_pairs <= kMaxPairsWithAxes, op, ": expected at most ", kMaxPairsWithAxes, " pairs with pair_axes, got ",
      num_pairs);
  TORCH_CHECK(
      static_cast<int64_t>(a.pair_axes.size()) == num_pairs, op,
      ": expected as many pair_axes as pairs, R/2 = ", num_pairs, ", got ", a.pair_axes.size());
  const int64_t num_axes = a.positions->size(0);
  for (const int64_t axis : a.pair_axes) {
    TORCH_CHECK(
        axis >= 0 && axis < num_axes, op, ": expected pair_axes of 0 to ", num_axes - 1, ", the axes of positions ",
        a.positions->sizes(), ", got ", axis);
  }
}

void check_tables(const char* op, const Rotation& a, const NamedTensor& q) {
  TORCH_CHECK(a.cos.defined() && a.sin.defined(), op, ": expected cos and sin to be tensors, got an undefined one");
  const auto expected_dtype = rotary_table_dtype(q.tensor.scalar_type());
  for (const NamedTensor& x : {NamedTensor{"cos", a.cos}, NamedTensor{"sin", a.sin}}) {
    TORCH_CHECK(
        x.tensor.scalar_type() == expected_dtype, op, ": expected ", x.name, " of dtype ", expected_dtype, " for ",
        q.name, " of dtype ", q.tensor.scalar_type(), ", got ", x.tensor.scalar_type());
    check_device(op, x, q);
  }
  TORCH_CHECK(
      a.cos.sizes() == a.sin.sizes(), op, ": expected cos and sin of the same shape, got ", a.cos.sizes(), " and ",
      a.sin.sizes());

  const Tensor& table = a.cos;
  const int64_t batch = batch_of(q.tensor);
  const int64_t seq_len = seq_len_of(q.tensor);
  const int64_t head_dim = q.tensor.size(-1);
  TORCH_CHECK(
      table.dim() == 2 || (table.dim() == 3 && !is_packed(q.tensor)), op, ": expected cos and sin of shape [P, R/2]",
      is_packed(q.tensor) ? "" : " or [B, S, R/2]", ", got ", table.sizes());
  TORCH_CHECK(
      table.size(-1) >= 1 && 2 * table.size(-1) <= head_dim, op,
      ": expected a rotary width R = 2 * cos.size(-1) of 2 to the head size of ", q.name, ", ", head_dim, ", got ",
      2 * table.size(-1));
  if (table.dim() == 3) {
    TORCH_CHECK(
        !a.positions.has_value(), op,
        ": expected no positions with tables given per token, [B, S, R/2] = ", table.sizes(),
        ", got positions of shape ", a.positions->sizes());
    TORCH_CHECK(
        (table.size(0) == batch || table.size(0) == 1) && table.size(1) == seq_len, op,
        ": expected cos and sin of shape [B, S, R/2] = [", batch, " or 1, ", seq_len, ", R/2], got ", table.sizes());
  } else if (!a.positions.has_value()) {
    TORCH_CHECK(
        table.size(0) >= seq_len, op, ": expected cos and sin with at least ", seq_len, " rows, one for each token of ",
        q.name, ", got ", table.sizes());
  } else {
    TORCH_CHECK(
        table.size(0) >= 1 || q.tensor.numel() == 0, op,
        ": expected cos and sin with at least one row for positions to choose, got ", table.sizes());
  }
}

/// Waits for the device. Called only if the user has turned `position_check` on.
void check_position_range(const char* op, const Tensor& positions, int64_t rows) {
  if (positions.numel() == 0) {
    return;
  }
  const auto [lowest, highest] = at::aminmax(positions);
  const auto low = lowest.item<int64_t>();
  const auto high = highest.item<int64_t>();
  const int64_t worst = low < 0 ? low : high;
  TORCH_CHECK_INDEX(
      low >= 0 && high < rows, op, ": expected positions in [0, ", rows, "), the rows of cos and sin, got values from ",
      low, " to ", high, ", ", worst, " at index ", at::IntArrayRef(posenc::detail::first_index(positions.eq(worst))));
}

bool has_equal_halves(const Tensor& table) {
  const int64_t half = table.size(-1) / 2;
  return table.size(-1) == 2 * half && at::equal(table.narrow(-1, 0, half), table.narrow(-1, half, half));
}

/// Throws if the tables have a column for each channel, `cat(freqs, freqs)`, as in transformers. Tables with sin = 0
/// pass: for position 0, correct tables have equal halves too. Waits for the device.
void check_table_width(const char* op, const Rotation& a, int64_t head_dim) {
  const int64_t rotary_dim = 2 * a.cos.size(-1);
  TORCH_CHECK_VALUE(
      a.cos.numel() == 0 || !a.pair_axes.empty() || !has_equal_halves(a.cos) || !has_equal_halves(a.sin) ||
          !a.sin.any().item<bool>(),
      op,
      ": expected cos and sin with one column for each pair, R/2 of R channels that are rotated, got two equal "
      "halves of ",
      a.cos.size(-1) / 2, " columns, which would rotate ", rotary_dim, " of ", head_dim,
      " channels. Give cos.narrow(-1, 0, ", a.cos.size(-1) / 2, ") and the same of sin if they are cat(freqs, freqs)");
}

RotaryTable table_view(const Tensor& table) {
  return {
      table.const_data_ptr(), table.dim() == 3 ? used_stride(table, 0) : 0, used_stride(table, -2),
      table.size(-1) == 1 ? 1 : table.stride(-1)};
}

PositionsView positions_view(const Rotation& a) {
  if (!a.positions.has_value()) {
    return {nullptr, 0, 0, 0, 0, false};
  }
  const Tensor& positions = *a.positions;
  const bool has_axes = !a.pair_axes.empty();
  const bool per_batch = positions.dim() == (has_axes ? 3 : 2);
  return {
      positions.const_data_ptr(),
      has_axes ? positions.stride(0) : 0,
      per_batch ? positions.stride(-2) : 0,
      positions.stride(-1),
      has_axes ? static_cast<int32_t>(positions.size(0)) : 0,
      positions.scalar_type() == at::kLong};
}

}  // namespace

PairAxes packed_pair_axes(at::IntArrayRef pair_axes) {
  PairAxes packed{};
  for (size_t pair = 0; pair < pair_axes.size(); ++pair) {
    packed.set(static_cast<int64_t>(pair), pair_axes[pair]);
  }
  return packed;
}

int64_t batch_of(const Tensor& tensor) {
  return is_packed(tensor) ? 1 : tensor.size(0);
}

int64_t seq_len_of(const Tensor& tensor) {
  return tensor.size(is_packed(tensor) ? 0 : 1);
}

Strides strides_of(const Tensor& tensor) {
  return {
      is_packed(tensor) ? 0 : used_stride(tensor, 0), used_stride(tensor, -3), used_stride(tensor, -2),
      tensor.stride(-1)};
}

void check_rotary(const char* op, const Rotation& rotation, RotatedList inputs) {
  const NamedTensor& first = inputs[0];
  for (const NamedTensor& input : inputs) {
    check_rotated(op, input);
  }
  if (inputs.size() == 2) {
    check_pair(op, first, inputs[1]);
  }
  if (rotation.positions.has_value()) {
    check_positions(op, rotation, first);
  }
  check_tables(op, rotation, first);
  check_pair_axes(op, rotation);
}

RotaryProblem describe_rotary(const char* op, const Rotation& rotation, RotatedList inputs) {
  const Tensor& first = inputs[0].tensor;
  RotaryProblem problem{};
  problem.batch = batch_of(first);
  problem.seq_len = seq_len_of(first);
  problem.head_dim = first.size(-1);
  problem.num_pairs = rotation.cos.size(-1);
  problem.table_rows = rotation.cos.size(-2);
  for (const NamedTensor& input : inputs) {
    problem.operands[problem.num_operands++] = operand_of(input.tensor);
  }
  problem.cos = table_view(rotation.cos);
  problem.sin = table_view(rotation.sin);
  problem.positions = positions_view(rotation);
  problem.interleaved = rotation.interleaved;
  problem.conjugate = rotation.conjugate;
  problem.pair_axes = packed_pair_axes(rotation.pair_axes);
  if (position_check()) {
    check_table_width(op, rotation, problem.head_dim);
    if (rotation.positions.has_value()) {
      check_position_range(op, *rotation.positions, problem.table_rows);
    }
  }
  return problem;
}

RotaryProblem rotary_problem(const char* op, const Rotation& rotation, RotatedList inputs) {
  check_rotary(op, rotation, inputs);
  return describe_rotary(op, rotation, inputs);
}

RotaryProblem::Operand operand_of(const Tensor& input) {
  return {input.const_data_ptr(), nullptr, strides_of(input), {}, input.size(-2)};
}

void set_output(const Tensor& output, RotaryProblem::Operand& operand) {
  operand.out = output.mutable_data_ptr();
  operand.out_strides = strides_of(output);
}

Tensor allocate_output(const Tensor& input, RotaryProblem::Operand& operand) {
  Tensor output = at::empty_like(input);
  set_output(output, operand);
  return output;
}

void check_rotary_in_place(const char* op, const Rotation& rotation, RotatedList inputs) {
  check_rotary(op, rotation, inputs);
  for (const NamedTensor& x : inputs) {
    check_no_overlap(op, x);
    check_no_overlap(op, x, {"cos", rotation.cos});
    check_no_overlap(op, x, {"sin", rotation.sin});
    if (rotation.positions.has_value()) {
      check_no_overlap(op, x, {"positions", *rotation.positions});
    }
  }
  if (inputs.size() == 2) {
    check_no_overlap(op, inputs[0], inputs[1]);
  }
}

RotaryProblem rotary_in_place_problem(const char* op, const Rotation& rotation, RotatedList inputs) {
  check_rotary_in_place(op, rotation, inputs);
  RotaryProblem problem = describe_rotary(op, rotation, inputs);
  for (size_t i = 0; i < inputs.size(); ++i) {
    set_output(inputs[i].tensor, problem.operands[i]);
  }
  return problem;
}

}  // namespace arguments
}  // namespace posenc
