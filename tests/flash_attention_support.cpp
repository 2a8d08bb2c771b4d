#include "flash_attention_support.h"
#include "gradcheck.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace posenc::test {
namespace {

/// For each pair of a query and a key, `[B, 1, Sq, Sk]`. Dimensions of size 1 are broadcast.
struct PairMasks {
  at::Tensor hidden;     // whether the query does not see the key
  at::Tensor no_query;   // whether the query is past the length of its sequence
  at::Tensor distances;  // |position of the query - position of the key|
};

/// The last query of a sequence is at its last key.
PairMasks pair_masks(const AttentionCase& c, at::Device device) {
  const auto lengths = [device](const std::vector<int64_t>& values, int64_t all) {
    return at::tensor(values.empty() ? std::vector<int64_t>{all} : values, at::kLong).to(device).view({-1, 1, 1, 1});
  };
  const at::Tensor q_lens = lengths(c.seqlens_q, c.q_len);
  const at::Tensor k_lens = lengths(c.seqlens_k, c.k_len);
  const at::Tensor rows = at::arange(c.q_len, q_lens.options()).unsqueeze(1);
  const at::Tensor columns = at::arange(c.k_len, q_lens.options());
  const at::Tensor ahead = columns - (rows + k_lens - q_lens);
  PairMasks masks{columns >= k_lens, rows >= q_lens, ahead.abs().to(at::kFloat)};
  const std::optional<int64_t> right = c.causal ? 0 : c.window_right;
  if (right) {
    masks.hidden = masks.hidden.logical_or(ahead > *right);
  }
  if (c.window_left) {
    masks.hidden = masks.hidden.logical_or(ahead < -*c.window_left);
  }
  return masks;
}

/// Attention in tensor operations, in float32 with the factor of the scores on q, or in the dtype with the factor on k.
/// The result has the dtype of q. Only scores with a bias are float32 in both, as slopes are.
at::Tensor plain_attention(const AttentionInputs& in, const AttentionCase& c, const PairMasks& masks, bool float32) {
  const auto heads_first = [&](const at::Tensor& x) {
    return (float32 ? x.to(at::kFloat) : x).transpose(1, 2).repeat_interleave(c.q_heads / x.size(2), 1);
  };
  const at::Tensor q = heads_first(in.q);
  const at::Tensor k = heads_first(in.k).transpose(2, 3);
  const at::Tensor v = heads_first(in.v);
  const double scale = std::sqrt(static_cast<double>(c.head_dim));
  at::Tensor scores = float32 ? at::matmul(q / scale, k) : at::matmul(q, k / scale);
  if (c.softcap) {
    scores = (scores / *c.softcap).tanh() * *c.softcap;
  }
  scores = scores.masked_fill(masks.hidden, -std::numeric_limits<double>::infinity());
  if (in.slopes.defined()) {
    scores = scores - in.slopes.unsqueeze(-1).unsqueeze(-1) * masks.distances;
  }
  at::Tensor probabilities = at::softmax(scores, -1).to(v.scalar_type());
  probabilities = probabilities.masked_fill(masks.hidden.all(-1, /*keepdim=*/true), 0).masked_fill(masks.no_query, 0);
  return at::matmul(probabilities, v).transpose(1, 2).to(in.q.scalar_type());
}

/// The tokens of all sequences, `[T, H, D]`, of a padded tensor `[B, S, H, D]`.
at::Tensor pack(const at::Tensor& x, const std::vector<int64_t>& lengths) {
  TensorList sequences;
  for (size_t b = 0; b < lengths.size(); ++b) {
    sequences.push_back(x[static_cast<int64_t>(b)].narrow(0, 0, lengths[b]));
  }
  return at::cat(sequences);
}

at::Tensor cumulative(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> sums{0};
  for (const int64_t length : lengths) {
    sums.push_back(sums.back() + length);
  }
  return at::tensor(sums, at::kInt);
}

double error(const at::Tensor& actual, const at::Tensor& expected) {
  return (actual.to(at::kFloat) - expected.to(at::kFloat)).abs().max().item<double>();
}

}  // namespace

AttentionInputs qkv_leaves(const AttentionInputs& in) {
  AttentionInputs leaves = attention_leaves(in);
  leaves.slopes = in.slopes;
  return leaves;
}

AttentionInputs packed(const AttentionInputs& in, const AttentionCase& c) {
  AttentionInputs result = in;
  result.q = pack(in.q, c.seqlens_q);
  result.k = pack(in.k, c.seqlens_k);
  result.v = pack(in.v, c.seqlens_k);
  result.options.cu_seqlens_q(cumulative(c.seqlens_q).to(in.q.device()))
      .cu_seqlens_k(cumulative(c.seqlens_k).to(in.q.device()))
      .max_seqlen_q(*std::max_element(c.seqlens_q.begin(), c.seqlens_q.end()))
      .max_seqlen_k(*std::max_element(c.seqlens_k.begin(), c.seqlens_k.end()));
  return result;
}

void expect_exact(
    const AttentionCase& c,
    const AttentionInputs& in,
    const at::Tensor& grad,
    const Tolerance& tolerance,
    Form form) {
  SCOPED_TRACE(::testing::Message() << c << (form == Form::packed ? ", packed" : "") << ", " << in.q.scalar_type());
  const bool is_packed = form == Form::packed;
  const AttentionInputs padded = qkv_leaves(in);
  const AttentionInputs own = is_packed ? qkv_leaves(packed(in, c)) : padded;
  const PairMasks masks = pair_masks(c, in.q.device());
  const auto with_gradients = [&grad](const at::Tensor& out, const AttentionInputs& of, const at::Tensor& cotangent) {
    TensorList all = grad.defined() ? gradients({out}, {of.q, of.k, of.v}, {cotangent}) : TensorList();
    all.insert(all.begin(), out.detach());
    return all;
  };
  const TensorList actual =
      with_gradients(attend(own), own, is_packed && grad.defined() ? pack(grad, c.seqlens_q) : grad);
  const TensorList expected = with_gradients(plain_attention(padded, c, masks, /*float32=*/true), padded, grad);
  const TensorList plain = with_gradients(plain_attention(padded, c, masks, /*float32=*/false), padded, grad);
  constexpr const char* kResults[] = {"out", "dq", "dk", "dv"};
  for (size_t i = 0; i < actual.size(); ++i) {
    const auto valid = [&](const at::Tensor& x) { return is_packed ? pack(x, i < 2 ? c.seqlens_q : c.seqlens_k) : x; };
    const at::Tensor wanted = valid(expected[i]);
    ASSERT_EQ(actual[i].sizes(), wanted.sizes());
    const double of_plain = error(valid(plain[i]), wanted);
    EXPECT_LE(
        error(actual[i], wanted),
        i == 0 ? tolerance.out * of_plain + tolerance.out_plus
               : tolerance.gradients * of_plain + tolerance.gradients_plus)
        << kResults[i];
  }
}

}  // namespace posenc::test
