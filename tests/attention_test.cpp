#include "alibi_attention_support.h"
#include "gradcheck.h"

#include <posenc/attention.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <limits>

// Attention without slopes against LibTorch's scaled_dot_product_attention, in float64. The grid of calls and the
// derivatives without slopes are in the tests of alibi_attention.
namespace posenc::test {
namespace {

/// Keys that a query sees before and after its position.
struct Window {
  std::optional<int64_t> left, right;
};

/// `scaled_dot_product_attention` of q `[B, Sq, Hq, D]` and k, v `[B, Sk, Hk, D]`. Query i is at key position
/// `offset + i`.
at::Tensor sdpa(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Window& window, int64_t offset) {
  const auto heads_first = [&q](const at::Tensor& x) {
    return x.transpose(1, 2).repeat_interleave(q.size(2) / x.size(2), 1);
  };
  const at::Tensor positions = at::arange(offset, offset + q.size(1), q.options().dtype(at::kLong)).unsqueeze(1);
  const at::Tensor ahead = at::arange(k.size(1), positions.options()) - positions;
  at::Tensor seen = at::ones_like(ahead, at::kBool);
  if (window.left) {
    seen = seen.logical_and(ahead >= -*window.left);
  }
  if (window.right) {
    seen = seen.logical_and(ahead <= *window.right);
  }
  return at::scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), seen).transpose(1, 2);
}

at::Tensor sdpa(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal, int64_t offset) {
  return sdpa(q, k, v, causal ? Window{std::nullopt, 0} : Window{}, offset);
}

/// Expects float64 results that differ by the order of sums only.
void expect_equal(const at::Tensor& actual, const at::Tensor& expected) {
  ASSERT_EQ(actual.sizes(), expected.sizes());
  EXPECT_LE((actual - expected).abs().max().item<double>(), 1e-13 * (1 + expected.abs().max().item<double>()));
}

class Attention : public DeviceTest {
 protected:
  AttentionInputs leaves(AttentionCase c) const {
    c.with_slopes = false;
    return attention_leaves(make_attention_inputs(c, {device().type(), at::kDouble}));
  }

  /// Compares output and gradients of q, k and v.
  static void expect_results(const AttentionInputs& in, const at::Tensor& expected) {
    const at::Tensor out = attend(in);
    expect_equal(out, expected);
    const TensorList grad = random_like({out});
    const TensorList found = gradients({out}, {in.q, in.k, in.v}, grad);
    const TensorList wanted = gradients({expected}, {in.q, in.k, in.v}, grad);
    for (size_t i = 0; i < found.size(); ++i) {
      expect_equal(found[i], wanted[i]);
    }
  }
};

INSTANTIATE_TEST_SUITE_P(Cpu, Attention, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, Attention, ::testing::Values(at::kCUDA), device_name);

TEST_P(Attention, OfPaddedTensorsIsThatOfLibTorch) {
  for (const bool causal : {false, true}) {
    for (const auto& [q_len, k_len] : std::vector<std::pair<int64_t, int64_t>>{{5, 7}, {1, 9}, {64, 64}, {130, 200}}) {
      for (const int64_t k_heads : {1, 2, 4}) {
        SCOPED_TRACE(c10::str(causal ? "causal, " : "", q_len, " x ", k_len, ", ", k_heads, " key heads"));
        AttentionCase c;
        c.causal = causal;
        c.q_len = q_len;
        c.k_len = k_len;
        c.k_heads = k_heads;
        const AttentionInputs in = leaves(c);
        expect_results(in, sdpa(in.q, in.k, in.v, causal, k_len - q_len));
      }
    }
  }
}

TEST_P(Attention, WithAnOffsetIsThatOfLibTorch) {
  for (const int64_t offset : {0, 1, 100}) {
    for (const bool causal : {false, true}) {
      AttentionCase c;
      c.causal = causal;
      c.query_offset = offset;
      const AttentionInputs in = leaves(c);
      expect_results(in, sdpa(in.q, in.k, in.v, causal, offset));
    }
  }
}

TEST_P(Attention, OfAPaddedBatchIsThatOfItsSequences) {
  for (const bool causal : {false, true}) {
    AttentionCase c;
    c.causal = causal;
    c.q_len = 20;
    c.k_len = 30;
    c.seqlens_q = {20, 7};
    c.seqlens_k = {25, 30};
    const AttentionInputs in = leaves(c);
    TensorList outs;
    for (int64_t b = 0; b < 2; ++b) {
      const int64_t q_len = c.seqlens_q[b];
      const int64_t k_len = c.seqlens_k[b];
      const at::Tensor out = sdpa(
          in.q.narrow(0, b, 1).narrow(1, 0, q_len), in.k.narrow(0, b, 1).narrow(1, 0, k_len),
          in.v.narrow(0, b, 1).narrow(1, 0, k_len), causal, k_len - q_len);
      outs.push_back(at::cat({out, at::zeros({1, c.q_len - q_len, c.q_heads, c.head_dim}, out.options())}, 1));
    }
    expect_results(in, at::cat(outs, 0));
  }
}

TEST_P(Attention, OfPackedSequencesIsThatOfEachOfThem) {
  for (const bool causal : {false, true}) {
    AttentionCase c;
    c.causal = causal;
    c.cu_seqlens_q = {0, 1, 70, 70, 100};
    c.cu_seqlens_k = {0, 40, 109, 120, 150};
    c.q_len = 100;
    c.k_len = 150;
    const AttentionInputs in = leaves(c);
    TensorList outs;
    for (size_t n = 0; n + 1 < c.cu_seqlens_q.size(); ++n) {
      const int64_t q_len = c.cu_seqlens_q[n + 1] - c.cu_seqlens_q[n];
      const int64_t k_len = c.cu_seqlens_k[n + 1] - c.cu_seqlens_k[n];
      const auto sequence = [](const at::Tensor& x, int64_t begin, int64_t count) {
        return x.narrow(0, begin, count).unsqueeze(0);
      };
      outs.push_back(sdpa(
                         sequence(in.q, c.cu_seqlens_q[n], q_len), sequence(in.k, c.cu_seqlens_k[n], k_len),
                         sequence(in.v, c.cu_seqlens_k[n], k_len), causal, k_len - q_len)
                         .squeeze(0));
    }
    expect_results(in, at::cat(outs, 0));
  }
}

/// Sides of windows around a block of rows and a tile of keys, and beyond all keys.
std::vector<Window> windows() {
  std::vector<Window> result;
  for (const int64_t side : {0, 1, 127, 128, 129, 1000}) {
    result.push_back({side, std::nullopt});
    result.push_back({std::nullopt, side});
    result.push_back({side, 0});
    result.push_back({1, side});
  }
  return result;
}

TEST_P(Attention, InAWindowIsThatOfLibTorch) {
  AttentionCase c;
  c.batch = 1;
  c.q_heads = 2;
  c.k_heads = 1;
  c.head_dim = 4;
  c.q_len = 200;
  c.k_len = 300;
  for (const Window& window : windows()) {
    for (const bool causal : {false, true}) {
      c.window_left = window.left;
      c.window_right = window.right;
      c.causal = causal;
      SCOPED_TRACE(c10::str(c));
      const AttentionInputs in = leaves(c);
      const Window visible{window.left, causal ? std::optional<int64_t>(0) : window.right};
      expect_results(in, sdpa(in.q, in.k, in.v, visible, c.k_len - c.q_len));
    }
  }
}

TEST_P(Attention, OfPackedSequencesInAWindowIsThatOfEachOfThem) {
  AttentionCase c;
  c.head_dim = 4;
  c.cu_seqlens_q = c.cu_seqlens_k = {0, 1, 140, 140, 300};
  c.q_len = c.k_len = 300;
  for (const Window& window : windows()) {
    c.window_left = window.left;
    c.window_right = window.right;
    SCOPED_TRACE(c10::str(c));
    const AttentionInputs in = leaves(c);
    TensorList outs;
    for (size_t n = 0; n + 1 < c.cu_seqlens_q.size(); ++n) {
      const auto part = [&](const at::Tensor& x) {
        return x.slice(0, c.cu_seqlens_q[n], c.cu_seqlens_q[n + 1]).unsqueeze(0);
      };
      outs.push_back(sdpa(part(in.q), part(in.k), part(in.v), window, 0).squeeze(0));
    }
    expect_results(in, at::cat(outs, 0));
  }
}

/// More scores than one block of rows holds: blocks begin at different first keys.
TEST_P(Attention, InAWindowOfManyBlocksOfRowsIsThatOfLibTorch) {
  AttentionCase c;
  c.batch = 1;
  c.q_heads = c.k_heads = 1;
  c.head_dim = 4;
  c.q_len = 4097;
  c.k_len = 4100;
  for (const Window& window : {Window{200, 0}, Window{5, 300}}) {
    c.window_left = window.left;
    c.window_right = window.right;
    const AttentionInputs in = leaves(c);
    expect_results(in, sdpa(in.q, in.k, in.v, window, c.k_len - c.q_len));
  }
}

/// The formula in float64: capped scores, then bias and mask, as in flash-attention and in Gemma 2 of transformers.
TEST_P(Attention, WithSoftcapIsTheFormula) {
  for (const bool with_slopes : {false, true}) {
    for (const double softcap : {0.5, 30.0}) {
      AttentionCase c;
      c.q_len = c.k_len = 70;
      c.k_heads = c.q_heads;
      c.scale = 2;
      c.causal = true;
      c.softcap = softcap;
      AttentionInputs in = make_attention_inputs(c, {device().type(), at::kDouble});
      in.slopes = with_slopes ? in.slopes.to(at::kDouble) : at::Tensor();
      in = attention_leaves(in);
      const auto heads_first = [](const at::Tensor& x) { return x.transpose(1, 2); };
      at::Tensor scores = at::matmul(heads_first(in.q), heads_first(in.k).transpose(2, 3)) * 2;
      scores = softcap * at::tanh(scores / softcap);
      const at::Tensor tokens = at::arange(c.q_len, in.q.options());
      const at::Tensor behind = tokens.unsqueeze(1) - tokens;
      if (with_slopes) {
        scores = scores - in.slopes.view({-1, 1, 1}) * behind;
      }
      const at::Tensor p = at::softmax(scores.masked_fill(behind < 0, -std::numeric_limits<double>::infinity()), -1);
      expect_results(in, at::matmul(p, heads_first(in.v)).transpose(1, 2));
    }
  }
}

std::vector<AttentionCase> cases_with_sinks() {
  std::vector<AttentionCase> cases(4);
  cases[1].causal = true;
  cases[1].query_offset = -2;  // two queries see no key
  cases[2].seqlens_q = {2, 5};
  cases[2].seqlens_k = {0, 6};
  cases[3].q_len = cases[3].k_len = 12;
  cases[3].cu_seqlens_q = {0, 3, 3, 10};
  return cases;
}

TEST_P(Attention, WithSinksHasOneMoreLogitWithoutAValue) {
  for (const AttentionCase& c : cases_with_sinks()) {
    SCOPED_TRACE(c10::str(c));
    AttentionInputs in = leaves(c);
    const at::Tensor sinks = at::tensor({-1.0, 0.0, 0.5, 3.0}, in.q.options()).requires_grad_();
    in.options.sinks(sinks);
    const TensorList of{in.q, in.k, in.v, sinks};
    const auto derivatives = [&of](const std::tuple<at::Tensor, at::Tensor>& results) {
      const auto& [out, lse] = results;
      TensorList all{out, lse};
      const TensorList first = gradients({out.pow(2), lse.sin()}, of, {at::ones_like(out), at::ones_like(lse)}, true);
      all.insert(all.end(), first.begin(), first.end());
      TensorList squares;
      for (const at::Tensor& x : first) {
        squares.push_back(x.pow(2).sum());
      }
      for (const at::Tensor& x : gradients({at::stack(squares).sum()}, of, {at::ones({}, first[0].options())})) {
        all.push_back(x);
      }
      return all;
    };
    const TensorList actual = derivatives(attention_with_lse(in.q, in.k, in.v, in.options));
    const TensorList expected = derivatives(reference_attention(in));
    for (size_t i = 0; i < actual.size(); ++i) {
      SCOPED_TRACE(i);
      const double size = 1 + expected[i].abs().max().item<double>();
      ASSERT_EQ(actual[i].sizes(), expected[i].sizes());
      EXPECT_LE((actual[i] - expected[i]).abs().max().item<double>(), 1e-12 * size);
    }
  }
}

TEST_P(Attention, WithSinksKeepsDtypeAndLayout) {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kFloat}) {
    for (const Strides strides : {Strides::dense, Strides::head_major, Strides::token_major}) {
      AttentionCase c;
      c.strides = strides;
      AttentionInputs in = make_attention_inputs(c, {device().type(), dtype});
      in.options.sinks(at::ones({c.q_heads}, in.q.options().dtype(at::kFloat)));
      const auto [out, lse] = attend_with_lse(in);
      EXPECT_EQ(out.scalar_type(), dtype);
      EXPECT_EQ(out.strides(), in.q.strides());
      EXPECT_EQ(lse.scalar_type(), at::kFloat);
    }
  }
}

TEST_P(Attention, NamesWhatIsWrongWithSinks) {
  const AttentionInputs in = leaves(AttentionCase());
  const auto expect = [&](const at::Tensor& sinks, const std::vector<std::string>& parts) {
    std::vector<std::string> all = parts;
    all.emplace_back("posenc::attention_sinks: expected sinks");
    expect_error([&] { attention(in.q, in.k, in.v, AttentionOptions().sinks(sinks)); }, all);
  };
  const at::Tensor sinks = at::ones({4}, in.q.options());
  expect(at::Tensor(), {"undefined"});
  expect(sinks.narrow(0, 0, 2), {"[Hq] = [4]", "got [2]"});
  expect(sinks.to(at::kHalf), {"float32 or float64", "got Half"});
  expect(sinks.to(at::kMeta), {"device of out", "got meta"});
}

TEST_P(Attention, WithSlopesInTheOptionsIsAlibiAttention) {
  const AttentionInputs in = make_attention_inputs(AttentionCase(), {device().type(), at::kFloat});
  expect_same_bits(attention(in.q, in.k, in.v, AttentionOptions(in.options).slopes(in.slopes)), attend(in));
}

TEST_P(Attention, NamesUndefinedTensors) {
  const AttentionInputs in = leaves(AttentionCase());
  const at::Tensor none;
  expect_error([&] { attention(none, none, none); }, {"posenc::alibi_attention: expected q", "undefined"});
  expect_error([&] { attention(in.q, none, in.v); }, {"posenc::alibi_attention: expected k", "undefined"});
  expect_error(
      [&] { attention(in.q, in.k, in.v, AttentionOptions().slopes(none)); },
      {"posenc::alibi_attention: expected slopes", "undefined"});
  expect_error(
      [&] { alibi_attention(in.q, in.k, in.v, none); }, {"posenc::alibi_attention: expected slopes", "undefined"});
}

/// Calls an operator with these first arguments and the defaults of the others.
std::vector<c10::IValue> call_operator(const char* name, std::vector<c10::IValue> stack) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
  for (size_t i = stack.size(); i < op.schema().arguments().size(); ++i) {
    stack.push_back(op.schema().arguments()[i].default_value().value());
  }
  op.callBoxed(stack);
  return stack;
}

TEST_P(Attention, HasNoGradientOfAbsentSlopes) {
  const AttentionInputs in = leaves(AttentionCase());
  const at::NoGradGuard no_grad;
  const auto [out, lse] = attend_with_lse(in);
  const c10::IValue none;
  const auto first = call_operator(
      "posenc::alibi_attention_backward", {at::ones_like(out), none, in.q, in.k, in.v, none, out, lse, true});
  EXPECT_FALSE(first[3].toTensor().defined());
  const auto second = call_operator(
      "posenc::alibi_attention_double_backward",
      {in.q, in.k, in.v, none, at::ones_like(out), none, in.q, in.k, in.v, none});
  EXPECT_FALSE(second[5].toTensor().defined());
  const at::Tensor slopes = at::ones({in.q.size(2)}, in.q.options());
  expect_error(
      [&, &out = out] {
        call_operator(
            "posenc::alibi_attention_double_backward",
            {none, none, none, slopes, at::ones_like(out), none, in.q, in.k, in.v, none});
      },
      {"posenc::alibi_attention_double_backward: expected slopes with grad_grad_slopes, got none"});
  expect_error(
      [&, &out = out, &lse = lse] {
        call_operator("posenc::alibi_attention_slope_sums", {at::ones_like(out), in.q, in.k, in.v, none, lse});
      },
      {"posenc::alibi_attention_slope_sums: expected slopes", "got none"});
}

}  // namespace
}  // namespace posenc::test
