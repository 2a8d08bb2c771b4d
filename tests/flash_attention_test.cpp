#include "flash_attention_support.h"
#include "gradcheck.h"

#include <posenc/attention.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>

// The tests of flash-attention (Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with
// IO-Awareness", https://github.com/Dao-AILab/flash-attention, tests/test_flash_attn.py) for `posenc::attention`: the
// same shapes, options and tolerances, in code of this library. An absolute error of 1e-5 is allowed everywhere, there
// only in some tests. Left out is what this library does not have: dropout, paged caches and the append of keys to a
// cache. Each test draws calls from the lists of parameters there; POSENC_TEST_CASES sets how many.
namespace posenc::test {
namespace {

/// How q, k and v `[B, S, H, D]` are stored.
enum class Storage {
  separate,
  kv_packed,  // k and v: views of [B, Sk, 2, Hk, D]
  qkv_packed  // q, k and v: views of [B, S, 3, H, D]
};

int64_t drawn(int64_t first, int64_t end) {
  return at::randint(first, end, {1}).item<int64_t>();
}
bool drawn_bool() {
  return drawn(0, 2) != 0;
}
template <class T>
T drawn_of(const std::vector<T>& values) {
  return values[static_cast<size_t>(drawn(0, static_cast<int64_t>(values.size())))];
}

using Lengths = std::pair<int64_t, int64_t>;  // of q, of k and v

const std::vector<int64_t> kHeadDims{32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256};
const std::vector<int64_t> kSmallHeadDims{32, 40, 59, 64, 80, 96, 111, 128};
const std::vector<Lengths> kLengths{{113, 203}, {128, 217},   {113, 211},   {108, 256},   {256, 512},
                                    {512, 256}, {1024, 1024}, {1023, 1024}, {1024, 1023}, {2048, 2048}};
const std::vector<Lengths> kCausalLengths{{1, 239},   {3, 799},   {127, 512}, {127, 513}, {113, 203},
                                          {128, 217}, {113, 211}, {108, 256}, {256, 512}, {1023, 1024}};

class FlashAttention : public TargetTest {
 protected:
  bool on_cpu() const { return device().is_cpu(); }

  /// Makes `check` with so many calls on a GPU, and with two on a CPU.
  void for_each_call(int64_t on_cuda, const std::function<void()>& check) const {
    for_each_seed(on_cpu() ? 2 : on_cuda, [&](uint64_t) { check(); });
  }

  at::Tensor randn(at::IntArrayRef sizes) const { return at::randn(sizes, at::device(device()).dtype(dtype())); }

  /// Lengths for this device: on a CPU up to 256.
  Lengths lengths_of(const std::vector<Lengths>& all) const {
    std::vector<Lengths> possible;
    for (const Lengths& lengths : all) {
      if (!on_cpu() || std::max(lengths.first, lengths.second) <= 256) {
        possible.push_back(lengths);
      }
    }
    return drawn_of(possible);
  }

  /// On a CPU, where tensor operations in bfloat16 are slow, with at most two sequences and 128 channels.
  AttentionCase call(int64_t batch, int64_t q_heads, int64_t k_heads, const Lengths& lengths) const {
    AttentionCase c;
    c.name = "Call";
    c.batch = on_cpu() ? std::min<int64_t>(batch, 2) : batch;
    c.q_heads = q_heads;
    c.k_heads = k_heads;
    c.q_len = lengths.first;
    c.k_len = lengths.second;
    c.head_dim = drawn_of(on_cpu() ? kSmallHeadDims : kHeadDims);
    c.with_slopes = false;
    return c;
  }

  /// Sides of a window below the number of keys. The left one is at least 1: with one visible key the gradients of q
  /// and k are zero except for rounding.
  static void draw_window(AttentionCase& c) {
    if (drawn_bool()) {
      c.window_left = drawn(1, std::max<int64_t>(c.k_len, 2));
      c.window_right = drawn(0, c.k_len);
    }
  }

  static void draw_slopes_and_masks(AttentionCase& c) {
    c.with_slopes = c.slopes_of_sequences = drawn_bool();
    c.causal = drawn_bool();
    draw_window(c);
  }

  /// Lengths of sequences up to 20 below the longest.
  static std::vector<int64_t> sequence_lengths(int64_t batch, int64_t longest) {
    std::vector<int64_t> lengths;
    for (int64_t b = 0; b < batch; ++b) {
      lengths.push_back(drawn(std::max<int64_t>(1, longest - 20), longest + 1));
    }
    return lengths;
  }

  static void draw_sequence_lengths(AttentionCase& c) {
    c.seqlens_q = sequence_lengths(c.batch, c.q_len);
    c.seqlens_k = sequence_lengths(c.batch, c.k_len);
  }

  /// Normally distributed q, k and v; slopes `[B, Hq]` from 0 to 0.3.
  AttentionInputs inputs(const AttentionCase& c, Storage storage = Storage::separate) const {
    AttentionInputs in;
    if (storage == Storage::qkv_packed) {
      const at::Tensor qkv = randn({c.batch, c.q_len, 3, c.q_heads, c.head_dim});
      in.q = qkv.select(2, 0);
      in.k = qkv.select(2, 1);
      in.v = qkv.select(2, 2);
    } else {
      // Scores then reach the cap.
      in.q = randn({c.batch, c.q_len, c.q_heads, c.head_dim}) * c.softcap.value_or(1);
      if (storage == Storage::kv_packed) {
        const at::Tensor kv = randn({c.batch, c.k_len, 2, c.k_heads, c.head_dim});
        in.k = kv.select(2, 0);
        in.v = kv.select(2, 1);
      } else {
        in.k = randn({c.batch, c.k_len, c.k_heads, c.head_dim});
        in.v = randn({c.batch, c.k_len, c.k_heads, c.head_dim});
      }
    }
    if (c.with_slopes) {
      in.slopes = at::rand({c.batch, c.q_heads}, at::device(device()).dtype(at::kFloat)) * 0.3;
    }
    in.options = AttentionOptions().causal(c.causal).window(c.window_left, c.window_right).softcap(c.softcap);
    return in;
  }

  void draw_and_compare(
      const AttentionCase& c,
      const Tolerance& tolerance,
      Storage storage = Storage::separate,
      Form form = Form::padded) const {
    const AttentionInputs in = inputs(c, storage);
    expect_exact(c, in, randn(in.q.sizes()), tolerance, form);
  }

  /// A call of test_flash_attn_output and test_flash_attn_varlen_output.
  AttentionCase output_call(const std::vector<Lengths>& lengths) const {
    const bool capped = drawn_bool();
    const int64_t heads = capped ? 4 : 6;
    const auto k_heads = drawn_of<int64_t>({heads, 1, 2});
    AttentionCase c = call(/*batch=*/4, heads, k_heads, lengths_of(lengths));
    if (capped) {
      c.softcap = 50;
    }
    draw_slopes_and_masks(c);
    return c;
  }
};

std::vector<Target> half_precision_on_cuda() {
  return {{at::kCUDA, at::kBFloat16}, {at::kCUDA, at::kHalf}};
}

INSTANTIATE_TEST_SUITE_P(Cpu, FlashAttention, ::testing::Values(Target{at::kCPU, at::kBFloat16}), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, FlashAttention, ::testing::ValuesIn(half_precision_on_cuda()), target_name);

/// test_flash_attn_output.
TEST_P(FlashAttention, Output) {
  for_each_call(200, [&] {
    const AttentionCase c = output_call(kLengths);
    draw_and_compare(c, {2, 3}, drawn_bool() ? Storage::kv_packed : Storage::separate);
  });
}

/// test_flash_attn_varlen_output.
TEST_P(FlashAttention, OutputOfPackedSequences) {
  std::vector<Lengths> lengths = kLengths;
  lengths.emplace_back(1, 147);
  for_each_call(200, [&] {
    AttentionCase c = output_call(lengths);
    draw_sequence_lengths(c);
    draw_and_compare(c, {2, 3}, drawn_bool() ? Storage::kv_packed : Storage::separate, Form::packed);
  });
}

std::vector<Lengths> equal_lengths(const std::vector<int64_t>& lengths) {
  std::vector<Lengths> result;
  for (const int64_t length : lengths) {
    result.emplace_back(length, length);
  }
  return result;
}

/// test_flash_attn_qkvpacked.
TEST_P(FlashAttention, OutputOfOneProjection) {
  for_each_call(60, [&] {
    const Lengths lengths = lengths_of(equal_lengths({97, 128, 200, 384, 768, 1024, 1025, 2048}));
    AttentionCase c = call(/*batch=*/4, /*q_heads=*/9, /*k_heads=*/9, lengths);
    draw_slopes_and_masks(c);
    draw_and_compare(c, Tolerance(), Storage::qkv_packed);
  });
}

/// test_flash_attn_varlen_qkvpacked.
TEST_P(FlashAttention, OutputOfOneProjectionOfPackedSequences) {
  for_each_call(60, [&] {
    const Lengths lengths = lengths_of(equal_lengths({97, 128, 200, 257, 384, 512, 768, 1025, 2048}));
    AttentionCase c = call(/*batch=*/5, /*q_heads=*/6, /*k_heads=*/6, lengths);
    draw_slopes_and_masks(c);
    c.seqlens_q = c.seqlens_k = sequence_lengths(c.batch, c.q_len);
    draw_and_compare(c, Tolerance(), Storage::qkv_packed, Form::packed);
  });
}

/// The lengths of q and of k exchanged in half of the calls.
Lengths in_any_order(const Lengths& lengths) {
  return drawn_bool() ? lengths : Lengths{lengths.second, lengths.first};
}

/// test_flash_attn_causal.
TEST_P(FlashAttention, Causal) {
  for_each_call(100, [&] {
    AttentionCase c = call(/*batch=*/8, /*q_heads=*/9, /*k_heads=*/9, in_any_order(lengths_of(kCausalLengths)));
    c.causal = true;
    draw_window(c);
    draw_and_compare(c, Tolerance());
  });
}

/// test_flash_attn_varlen_causal.
TEST_P(FlashAttention, CausalOfPackedSequences) {
  for_each_call(100, [&] {
    AttentionCase c = call(/*batch=*/8, /*q_heads=*/9, /*k_heads=*/9, in_any_order(lengths_of(kCausalLengths)));
    c.causal = true;
    draw_window(c);
    draw_sequence_lengths(c);
    draw_and_compare(c, Tolerance(), Storage::separate, Form::packed);
  });
}

/// test_flash_attn_splitkv.
TEST_P(FlashAttention, FewQueriesAndManyKeys) {
  const std::vector<Lengths> lengths{{3, 1024},   {1, 339},     {64, 800},  {3, 799},  {64, 2048},
                                     {16, 20000}, {16, 100000}, {128, 128}, {256, 256}};
  for_each_call(60, [&] {
    AttentionCase c = call(/*batch=*/1, /*q_heads=*/12, /*k_heads=*/12, in_any_order(lengths_of(lengths)));
    draw_slopes_and_masks(c);
    draw_and_compare(c, {2, c.with_slopes ? 8.0 : 2.0, 1e-5, 2e-4});
  });
}

/// test_flash_attn_kvcache: queries at the end of a part of a cache.
TEST_P(FlashAttention, OfACache) {
  const std::vector<Lengths> lengths{{1, 128},   {1, 339},    {3, 1024},       {64, 800},        {64, 256}, {3, 799},
                                     {64, 2048}, {16, 20000}, {1, 128 * 1024}, {16, 128 * 1024}, {128, 128}};
  for_each_call(60, [&] {
    const auto k_heads = drawn_of<int64_t>({6, 1, 3});
    AttentionCase c = call(/*batch=*/2, /*q_heads=*/6, k_heads, lengths_of(lengths));
    draw_slopes_and_masks(c);
    c.seqlens_q.assign(2, c.q_len);
    c.seqlens_k = {drawn(1, c.k_len + 1), drawn(1, c.k_len + 1)};
    AttentionInputs in = inputs(c);
    in.options.seqlens_q(at::tensor(c.seqlens_q).to(device())).seqlens_k(at::tensor(c.seqlens_k).to(device()));
    expect_exact(c, in, /*grad=*/at::Tensor(), {c.with_slopes ? 5.0 : 3.0});
  });
}

/// test_flash_attn_bwd_overflow: large scores, and fewer keys than a tile. The factor is 5 there, in float16 alone.
TEST_P(FlashAttention, GradientsOfLargeScores) {
  for (const int64_t length : on_cpu() ? std::vector<int64_t>{1, 2, 5, 17} : std::vector<int64_t>{1, 2, 5, 17, 128}) {
    for (const int64_t head_dim : {16, 32, 64}) {
      for (const bool causal : {false, true}) {
        AttentionCase c = call(/*batch=*/2, /*q_heads=*/5, /*k_heads=*/5, {length, length});
        c.head_dim = head_dim;
        c.causal = causal;
        AttentionInputs in = inputs(c);
        in.q = in.q * 5;
        in.k = in.k * 3;
        in.v = in.v * 3;
        // The largest error of plain operations is that of few numbers with one or two tokens, and may be small.
        const double factor = length <= 2 ? 10 : 5;
        expect_exact(c, in, randn(in.q.sizes()), {2, factor, 1e-5, 1e-3});
      }
    }
  }
}

/// test_flash_attn_bwd_varlen_overflow: more queries than keys in every packed sequence.
TEST_P(FlashAttention, GradientsOfOneKeyAreFinite) {
  for (const int64_t head_dim : {16, 32, 64}) {
    for (const bool causal : {false, true}) {
      const at::Tensor q = (randn({256, 5, head_dim}) * 3).requires_grad_();
      const at::Tensor k = (randn({3, 5, head_dim}) * 3).requires_grad_();
      const at::Tensor v = (randn({3, 5, head_dim}) * 3).requires_grad_();
      const at::Tensor out = attention(
          q, k, v,
          AttentionOptions()
              .causal(causal)
              .cu_seqlens_q(at::tensor({0, 76, 110, 256}, at::kInt).to(device()))
              .cu_seqlens_k(at::tensor({0, 1, 2, 3}, at::kInt).to(device()))
              .max_seqlen_q(256)
              .max_seqlen_k(3));
      for (const at::Tensor& x : gradients({out}, {q, k, v}, {randn(out.sizes())})) {
        EXPECT_TRUE(x.isfinite().all().item<bool>());
      }
    }
  }
}

/// test_flash_attn_bwd_transpose.
TEST_P(FlashAttention, GradientsForAGradientOfAnyStrides) {
  for (const int64_t length : on_cpu() ? std::vector<int64_t>{97} : std::vector<int64_t>{97, 128, 200, 256}) {
    for (const int64_t head_dim : {64, 128}) {
      for (const bool causal : {false, true}) {
        AttentionCase c = call(/*batch=*/5, /*q_heads=*/2, /*k_heads=*/2, {length, length});
        c.head_dim = head_dim;
        c.causal = causal;
        const at::Tensor grad = randn({length, 2 * c.batch, 2, head_dim}).slice(1, 0, 2 * c.batch, 2).transpose(0, 1);
        expect_exact(c, inputs(c), grad, Tolerance());
      }
    }
  }
}

/// test_flash_attn_deterministic and test_flash_attn_varlen_deterministic.
TEST_P(FlashAttention, GradientsHaveTheSameBitsEveryTime) {
  const DeterministicAlgorithms deterministic;
  for_each_call(20, [&] {
    AttentionCase c = call(/*batch=*/4, /*q_heads=*/9, /*k_heads=*/9, in_any_order(lengths_of(kCausalLengths)));
    c.causal = drawn_bool();
    draw_window(c);
    draw_sequence_lengths(c);
    SCOPED_TRACE(::testing::Message() << c);
    const AttentionInputs padded = inputs(c);
    const AttentionInputs in = qkv_leaves(drawn_bool() ? padded : packed(padded, c));
    const at::Tensor out = attend(in);
    const at::Tensor grad = randn(out.sizes());
    const TensorList first = gradients({out}, {in.q, in.k, in.v}, {grad});
    for (int repeat = 0; repeat < (on_cpu() ? 1 : 50); ++repeat) {
      const TensorList again = gradients({out}, {in.q, in.k, in.v}, {grad});
      for (size_t i = 0; i < first.size(); ++i) {
        expect_same_bits(again[i], first[i]);
      }
    }
  });
}

}  // namespace
}  // namespace posenc::test
