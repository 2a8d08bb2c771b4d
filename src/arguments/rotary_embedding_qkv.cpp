#include <arguments/rotary_embedding_qkv.h>
#include <arguments/tensor.h>

#include <ATen/ops/empty.h>

#include <vector>

namespace posenc::arguments {
namespace {

using at::Tensor;

void add_copied(const Tensor& v, RotaryProblem& problem) {
  problem.operands[RotaryProblem::kCopied] = operand_of(v);
  problem.num_operands = 3;
}

}  // namespace

void check_head_counts(const char* op, int64_t num_q_heads, int64_t num_kv_heads) {
  TORCH_CHECK(
      num_q_heads >= 1 && num_kv_heads >= 1, op, ": expected num_q_heads and num_kv_heads of at least 1, got ",
      num_q_heads, " and ", num_kv_heads);
}

PackedViews packed_views(
    const char* op,
    const char* name,
    const Tensor& packed,
    int64_t num_q_heads,
    int64_t num_kv_heads) {
  check_defined(op, name, packed);
  check_head_counts(op, num_q_heads, num_kv_heads);
  TORCH_CHECK(
      packed.dim() >= 2 && packed.dim() <= 5, op, ": expected ", name,
      " of shape [B, S, (Hq + 2 Hk) D], [T, (Hq + 2 Hk) D], [B, S, 3, H, D] or [T, 3, H, D], got ", packed.sizes());
  if (is_stacked(packed.dim())) {
    TORCH_CHECK(
        packed.sym_size(-3) == 3 && packed.sym_size(-2) == num_q_heads && num_q_heads == num_kv_heads, op,
        ": expected ", name, " of shape [.., 3, H, D] with H = num_q_heads = num_kv_heads, got ", packed.sizes(), ", ",
        num_q_heads, " and ", num_kv_heads);
    return {packed.select(-3, 0), packed.select(-3, 1), packed.select(-3, 2)};
  }
  // The sum of the numbers of heads that the user gave may overflow. Each is at most the number of channels.
  const c10::SymInt channels = packed.sym_size(-1);
  TORCH_CHECK(
      channels >= num_q_heads && channels >= num_kv_heads && channels % (num_q_heads + 2 * num_kv_heads) == 0, op,
      ": expected ", name, " with a multiple of num_q_heads + 2 num_kv_heads channels, Hq = ", num_q_heads,
      " and Hk = ", num_kv_heads, ", got ", packed.sizes());
  const int64_t num_heads = num_q_heads + 2 * num_kv_heads;
  // `view`, because `unflatten` has no rule for batched gradients.
  std::vector<c10::SymInt> sizes = packed.sym_sizes().slice(0, packed.dim() - 1).vec();
  sizes.emplace_back(num_heads);
  sizes.push_back(channels / num_heads);
  const Tensor heads = packed.view_symint(sizes);
  return {
      heads.narrow(-2, 0, num_q_heads), heads.narrow(-2, num_q_heads, num_kv_heads),
      heads.narrow(-2, num_q_heads + num_kv_heads, num_kv_heads)};
}

void check_rotary_pack(const char* op, const PackRotation& rotation, const PackedViews& from) {
  check_rotary(op, rotation.rotation(), {{"q", from.q}, {"k", from.k}});
  check_defined(op, "v", from.v);
  check_like(op, {"v", from.v}, {"k", from.k});
  TORCH_CHECK(
      !rotation.stacked || from.q.size(-2) == from.k.size(-2), op,
      ": expected q and k of as many heads where they are stacked, [.., 3, H, D], got ", from.q.sizes(), " and ",
      from.k.sizes());
}

RotaryQkvCall rotary_qkv_call(const char* op, const Rotation& rotation, const PackedViews& from) {
  RotaryQkvCall call;
  call.problem = rotary_problem(op, rotation, {{"qkv", from.q}, {"qkv", from.k}});
  add_copied(from.v, call.problem);
  const auto allocate = [](const Tensor& view, RotaryProblem::Operand& operand) {
    Tensor output = at::empty(view.sizes(), view.options());
    set_output(output, operand);
    return output;
  };
  call.to.q = allocate(from.q, call.problem.operands[0]);
  call.to.k = allocate(from.k, call.problem.operands[1]);
  call.to.v = allocate(from.v, call.problem.operands[RotaryProblem::kCopied]);
  return call;
}

RotaryPackCall rotary_pack_call(const char* op, const PackRotation& rotation, const PackedViews& from) {
  check_rotary_pack(op, rotation, from);
  RotaryPackCall call;
  call.problem = describe_rotary(op, rotation.rotation(), {{"q", from.q}, {"k", from.k}});
  add_copied(from.v, call.problem);

  const int64_t num_q_heads = from.q.size(-2);
  const int64_t num_kv_heads = from.k.size(-2);
  const int64_t head_dim = from.q.size(-1);
  std::vector<int64_t> sizes = from.q.sizes().slice(0, from.q.dim() - 2).vec();
  const std::vector<int64_t> of_token = rotation.stacked
      ? std::vector<int64_t>{3, num_q_heads, head_dim}
      : std::vector<int64_t>{(num_q_heads + 2 * num_kv_heads) * head_dim};
  sizes.insert(sizes.end(), of_token.begin(), of_token.end());
  call.packed = at::empty(sizes, from.q.options());
  const PackedViews to = packed_views(op, "the output", call.packed, num_q_heads, num_kv_heads);
  set_output(to.q, call.problem.operands[0]);
  set_output(to.k, call.problem.operands[1]);
  set_output(to.v, call.problem.operands[RotaryProblem::kCopied]);
  return call;
}

}  // namespace posenc::arguments
