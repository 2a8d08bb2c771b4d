#include "alibi_attention_support.h"

#include "gradcheck.h"

#include <posenc/reference.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

namespace posenc::test {

std::ostream& operator<<(std::ostream& stream, const AttentionCase& c) {
  stream << c.name << ": " << (c.packed() ? "packed, " : "") << "B " << c.batch << ", S " << c.q_len << " x " << c.k_len
         << ", heads " << c.q_heads << "/" << c.k_heads << " of " << c.head_dim << ", " << strides_name(c.strides)
         << (c.causal ? ", causal" : "") << (c.every_other_slope ? ", every other slope" : "")
         << (c.with_slopes ? "" : ", no slopes") << (c.slopes_of_sequences ? ", slopes of sequences" : "");
  if (c.query_offset) {
    stream << ", query_offset " << *c.query_offset;
  }
  if (c.softcap) {
    stream << ", softcap " << *c.softcap;
  }
  if (c.window_left) {
    stream << ", window_left " << *c.window_left;
  }
  if (c.window_right) {
    stream << ", window_right " << *c.window_right;
  }
  const auto list = [&stream](const char* name, const std::vector<int64_t>& values) {
    if (!values.empty()) {
      stream << ", " << name << " " << at::IntArrayRef(values);
    }
  };
  list("seqlens_q", c.seqlens_q);
  list("seqlens_k", c.seqlens_k);
  list("cu_seqlens_q", c.cu_seqlens_q);
  list("cu_seqlens_k", c.cu_seqlens_k);
  return stream;
}

AttentionInputs make_attention_inputs(const AttentionCase& c, const Target& target) {
  const auto draw = [&](int64_t tokens, int64_t heads) {
    const std::vector<int64_t> sizes = c.packed() ? std::vector<int64_t>{tokens, heads, c.head_dim}
                                                  : std::vector<int64_t>{c.batch, tokens, heads, c.head_dim};
    return random_tensor(sizes, target, c.strides);
  };
  AttentionInputs in;
  in.q = draw(c.q_len, c.q_heads);
  in.k = draw(c.k_len, c.k_heads);
  in.v = draw(c.k_len, c.k_heads);
  if (c.with_slopes) {
    std::vector<int64_t> sizes{c.every_other_slope ? 2 * c.q_heads : c.q_heads};
    if (c.slopes_of_sequences) {
      sizes.insert(sizes.begin(), c.packed() ? static_cast<int64_t>(c.cu_seqlens_q.size()) - 1 : c.batch);
    }
    in.slopes = (at::randint(1, 257, sizes, at::kFloat) / 256 * c.largest_slope).to(target.device);
    if (c.every_other_slope) {
      in.slopes = in.slopes.slice(-1, 0, sizes.back(), 2);
    }
  }
  const auto tensor = [&](const std::vector<int64_t>& values) {
    return values.empty() ? std::optional<at::Tensor>() : at::tensor(values, at::kInt).to(target.device);
  };
  const auto longest = [](const std::vector<int64_t>& begins) {
    int64_t most = 0;
    for (size_t i = 1; i < begins.size(); ++i) {
      most = std::max(most, begins[i] - begins[i - 1]);
    }
    return begins.empty() ? std::optional<int64_t>() : most;
  };
  in.options = ALiBiAttentionOptions()
                   .scale(c.scale)
                   .causal(c.causal)
                   .query_offset(c.query_offset)
                   .seqlens_q(tensor(c.seqlens_q))
                   .seqlens_k(tensor(c.seqlens_k))
                   .cu_seqlens_q(tensor(c.cu_seqlens_q))
                   .cu_seqlens_k(tensor(c.cu_seqlens_k))
                   .max_seqlen_q(longest(c.cu_seqlens_q))
                   .max_seqlen_k(longest(c.cu_seqlens_k))
                   .window(c.window_left, c.window_right)
                   .softcap(c.softcap);
  return in;
}

AttentionInputs in_float64(const AttentionInputs& in) {
  AttentionInputs wide = in;
  for (at::Tensor* tensor : {&wide.q, &wide.k, &wide.v, &wide.slopes}) {
    if (tensor->defined()) {
      *tensor = tensor->to(at::kDouble);
    }
  }
  return wide;
}

double relative_error(const at::Tensor& actual, const at::Tensor& expected) {
  const at::Tensor a = actual.detach().to(at::kDouble);
  const at::Tensor e = expected.detach().to(at::kDouble);
  return ((a - e).norm() / e.norm()).item<double>();
}

AttentionInputs attention_leaves(const AttentionInputs& in) {
  AttentionInputs leaves = in;
  for (at::Tensor* tensor : {&leaves.q, &leaves.k, &leaves.v, &leaves.slopes}) {
    if (tensor->defined()) {
      *tensor = tensor->detach().requires_grad_();
    }
  }
  return leaves;
}

at::Tensor attend(const AttentionInputs& in) {
  return in.slopes.defined() ? posenc::alibi_attention(in.q, in.k, in.v, in.slopes, in.options)
                             : posenc::attention(in.q, in.k, in.v, in.options);
}

std::tuple<at::Tensor, at::Tensor> attend_with_lse(const AttentionInputs& in) {
  return in.slopes.defined() ? posenc::alibi_attention_with_lse(in.q, in.k, in.v, in.slopes, in.options)
                             : posenc::attention_with_lse(in.q, in.k, in.v, in.options);
}

std::tuple<at::Tensor, at::Tensor> reference_attention(const AttentionInputs& in) {
  return in.slopes.defined() ? reference::alibi_attention(in.q, in.k, in.v, in.slopes, in.options)
                             : reference::attention(in.q, in.k, in.v, in.options);
}

at::Tensor slope_sums(const AttentionInputs& in, const at::Tensor& grad, const at::Tensor& lse) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("posenc::alibi_attention_slope_sums", "");
  const ALiBiAttentionOptions& o = in.options;
  std::vector<c10::IValue> stack{
      grad,
      in.q,
      in.k,
      in.v,
      in.slopes.defined() ? std::optional<at::Tensor>(in.slopes) : std::nullopt,
      lse,
      o.scale(),
      o.causal(),
      o.query_offset(),
      o.seqlens_q(),
      o.seqlens_k(),
      o.cu_seqlens_q(),
      o.cu_seqlens_k(),
      o.max_seqlen_q(),
      o.max_seqlen_k(),
      o.window_left(),
      o.window_right(),
      o.softcap()};
  op.callBoxed(stack);
  return stack.at(0).toTensor();
}

void expect_held(const at::Tensor& actual, const at::Tensor& expected, const at::Tensor& bound, const char* name) {
  SCOPED_TRACE(name);
  const at::Tensor infinite = expected.isinf();
  const at::Tensor wide = actual.detach().to(at::kCPU, at::kDouble);
  EXPECT_TRUE(wide.eq(expected).logical_or(infinite.logical_not()).all().item<bool>()) << "an infinity is missing";
  expect_within(wide.masked_fill(infinite, 0), expected.masked_fill(infinite, 0), bound.masked_fill(infinite, 0));
}

Held hold(const AttentionInputs& inputs) {
  const AttentionInputs in = attention_leaves(inputs);
  const auto [out, lse] = attend_with_lse(in);
  const at::Tensor grad_out = at::randn(out.sizes(), at::kDouble).to(out.options());
  const at::Tensor grad_lse = at::randn(lse.sizes(), at::kDouble).to(lse.options());
  TensorList leaves{in.q, in.k, in.v};
  if (in.slopes.defined()) {
    leaves.push_back(in.slopes);
  }
  TensorList found = gradients({out, lse}, leaves, {grad_out, grad_lse});
  found.resize(4);
  // Fused attention rounds probabilities to the dtype of v.
  const bool may_be_fused = out.is_cuda() && out.element_size() == 2;
  const double rounding = may_be_fused ? unit_roundoff(out.scalar_type()) : 0;
  return {{out, lse, found[0], found[1], found[2], found[3]}, scalar_attention(in, grad_out, grad_lse, rounding)};
}

void expect_scalar_results(const AttentionInputs& inputs) {
  const auto [actual, expected] = hold(inputs);
  EXPECT_EQ(actual.out.scalar_type(), inputs.q.scalar_type());
  EXPECT_EQ(actual.lse.scalar_type(), inputs.q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  expect_held(actual.out, expected.values.out, expected.bounds.out, "out");
  expect_held(actual.lse, expected.values.lse, expected.bounds.lse, "lse");
  expect_held(actual.dq, expected.values.dq, expected.bounds.dq, "gradient to q");
  expect_held(actual.dk, expected.values.dk, expected.bounds.dk, "gradient to k");
  expect_held(actual.dv, expected.values.dv, expected.bounds.dv, "gradient to v");
  ASSERT_EQ(actual.dslopes.defined(), inputs.slopes.defined());
  if (actual.dslopes.defined()) {
    expect_held(actual.dslopes, expected.values.dslopes, expected.bounds.dslopes, "gradient to slopes");
  }
}

}  // namespace posenc::test
