#include "alibi_attention_cuda_support.h"
#include "cuda_support.h"
#include "gradcheck.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>

#include <limits>

// Attention by the kernels of this library, which compute all calls in 16-bit dtypes that cuDNN does not.
namespace posenc::test {
namespace {

/// Skips without a GPU that can run the kernels; switches cuDNN off.
class AlibiAttentionTiledCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    require_device(at::kCUDA);
    if (IsSkipped() || HasFatalFailure()) {
      return;
    }
    if (at::cuda::getCurrentDeviceProperties()->major < 8) {
      GTEST_SKIP() << "the kernels need compute capability 8.0";
    }
    at::globalContext().setUserEnabledCuDNN(false);
  }
  void TearDown() override { at::globalContext().setUserEnabledCuDNN(true); }

  static AttentionCase self_attention(int64_t length) {
    AttentionCase c;
    c.q_len = c.k_len = length;
    c.head_dim = 64;
    c.largest_slope = 0.5;
    return c;
  }

  /// Computes a call and compares all results with float64.
  static void expect_right(const AttentionCase& c, at::ScalarType dtype = at::kBFloat16) {
    SCOPED_TRACE(::testing::Message() << c << ", " << dtype);
    const AttentionInputs in = make_attention_inputs(c, {at::kCUDA, dtype});
    const at::Tensor grad = at::randn(in.q.sizes(), at::kFloat).to(in.q.options());
    TensorList actual;
    const std::string said = logged([&] { actual = everything(in, grad); });
    EXPECT_NE(said.find(kTiled), std::string::npos);
    EXPECT_EQ(said.find(kNotFused), std::string::npos);
    expect_everything_right(c, in, grad, actual);
  }
};

class AlibiAttentionTiledCudaForms : public AlibiAttentionTiledCuda,
                                     public ::testing::WithParamInterface<std::tuple<at::ScalarType, AttentionCase>> {};

TEST_P(AlibiAttentionTiledCudaForms, AreRight) {
  const auto& [dtype, c] = GetParam();
  expect_right(c, dtype);
}

INSTANTIATE_TEST_SUITE_P(
    Cuda,
    AlibiAttentionTiledCudaForms,
    ::testing::Combine(::testing::Values(at::kBFloat16, at::kHalf), ::testing::ValuesIn(attention_forms())),
    attention_form_name);

TEST_F(AlibiAttentionTiledCuda, TakesAnyHeadSizeUpTo256) {
  for (const int64_t head_dim : {1, 7, 8, 20, 40, 63, 65, 72, 100, 136, 160, 200, 248, 255}) {
    for (const bool causal : {false, true}) {
      AttentionCase c = self_attention(130);
      c.head_dim = head_dim;
      c.causal = causal;
      expect_right(c, at::kHalf);
    }
  }
}

TEST_F(AlibiAttentionTiledCuda, DividesManyKeysOfFewQueries) {
  for (const int64_t queries : {1, 3, 63, 129}) {
    for (const int64_t keys : {511, 4096, 5001}) {
      for (const bool causal : {false, true}) {
        AttentionCase c;
        c.q_len = queries;
        c.k_len = keys;
        c.head_dim = 128;
        c.q_heads = 8;
        c.causal = causal;
        c.largest_slope = 0x1p-6;
        expect_right(c, at::kHalf);
        c.seqlens_q = {queries, queries / 2};
        c.seqlens_k = {keys - 1, keys / 3};
        expect_right(c, at::kHalf);
      }
    }
  }
}

TEST_F(AlibiAttentionTiledCuda, DividesManyKeysOfPackedQueries) {
  AttentionCase c;
  c.q_len = 4;
  c.k_len = 9000;
  c.head_dim = 128;
  c.causal = true;
  c.largest_slope = 0x1p-6;
  c.cu_seqlens_q = {0, 1, 3, 4};
  c.cu_seqlens_k = {0, 5000, 5001, 9000};
  expect_right(c, at::kHalf);
}

TEST_F(AlibiAttentionTiledCuda, TakesManyPackedSequences) {
  AttentionCase c;
  c.head_dim = 64;
  c.cu_seqlens_q = {0};
  const at::Tensor lengths = at::randint(0, 150, {100});
  for (int64_t i = 0; i < lengths.size(0); ++i) {
    c.cu_seqlens_q.push_back(c.cu_seqlens_q.back() + lengths[i].item<int64_t>());
  }
  c.q_len = c.k_len = c.cu_seqlens_q.back() + 5;  // five tokens are in no sequence
  for (const bool causal : {false, true}) {
    c.causal = causal;
    expect_right(c);
  }
}

TEST_F(AlibiAttentionTiledCuda, LengthsBeyondTheTensorsGiveNaNForTheirSequence) {
  AttentionInputs in = make_attention_inputs(self_attention(65), {at::kCUDA, at::kBFloat16});
  in = attention_leaves(in);
  in.options.query_offset(0).seqlens_k(at::tensor({66, 30}, at::kInt).cuda());
  const at::Tensor out = attend(in);
  const TensorList results = gradients({out}, {in.q, in.k, in.v, in.slopes}, {at::ones_like(out)});
  for (const at::Tensor& x : {out, results[0], results[1], results[2]}) {
    EXPECT_TRUE(x[0].isnan().all().item<bool>());
    EXPECT_FALSE(x[1].isnan().any().item<bool>());
  }
  EXPECT_TRUE(results[3].isnan().all().item<bool>());
}

TEST_F(AlibiAttentionTiledCuda, PackedLengthsBeyondTheTensorsGiveNaNForTheirSequence) {
  AttentionCase c = self_attention(100);
  c.cu_seqlens_q = {0, 40, 100};
  AttentionInputs in = attention_leaves(make_attention_inputs(c, {at::kCUDA, at::kBFloat16}));
  const auto expect_last_nan = [&] {
    const at::Tensor out = attend(in);
    const TensorList results = gradients({out}, {in.q, in.k, in.v}, {at::ones_like(out)});
    for (const at::Tensor& x : {out, results[0], results[1], results[2]}) {
      EXPECT_FALSE(x.slice(0, 0, 40).isnan().any().item<bool>());
      EXPECT_TRUE(x.slice(0, 40).isnan().all().item<bool>());
    }
  };
  in.options.cu_seqlens_q(at::tensor({0, 40, 101}).cuda()).cu_seqlens_k(std::nullopt).max_seqlen_q(61);
  expect_last_nan();
  in.options.cu_seqlens_q(at::tensor({0, 40, 100}).cuda()).max_seqlen_q(59);
  expect_last_nan();
}

TEST_F(AlibiAttentionTiledCuda, GivesTheSameBitsEveryTime) {
  for (const int64_t queries : {3, 1024}) {
    AttentionCase c = self_attention(1024);
    c.q_len = queries;
    c.causal = true;
    const AttentionInputs in = make_attention_inputs(c, {at::kCUDA, at::kBFloat16});
    const at::Tensor grad = at::randn(in.q.sizes(), at::kFloat).to(in.q.options());
    const TensorList first = everything(in, grad);
    for (int repeat = 0; repeat < 5; ++repeat) {
      const TensorList again = everything(in, grad);
      for (size_t i = 0; i < first.size(); ++i) {
        expect_same_bits(again[i], first[i]);
      }
    }
  }
}

/// A cache that grows by one key in each step, with cuDNN switched on.
TEST_F(AlibiAttentionTiledCuda, DecodingBuildsNoPlan) {
  at::globalContext().setUserEnabledCuDNN(true);
  AttentionCase c;
  c.q_len = 1;
  c.k_len = 300;
  c.head_dim = 128;
  c.causal = true;
  const AttentionInputs cache = make_attention_inputs(c, {at::kCUDA, at::kHalf});
  const std::string said = logged([&] {
    for (int64_t length = 200; length < 300; ++length) {
      AttentionInputs in = cache;
      in.k = cache.k.narrow(1, 0, length);
      in.v = cache.v.narrow(1, 0, length);
      attend(in);
    }
  });
  EXPECT_EQ(said.find("plan for the forward pass"), std::string::npos);
  EXPECT_NE(said.find(kTiled), std::string::npos);
}

TEST_F(AlibiAttentionTiledCuda, CudaGraphsReplayWithNewLengths) {
  require_caching_allocator();
  AttentionCase c = self_attention(448);
  c.cu_seqlens_q = {0, 200, 448};
  const AttentionInputs in = attention_leaves(make_attention_inputs(c, {at::kCUDA, at::kBFloat16}));
  const at::Tensor grad = at::randn(in.q.sizes(), at::kFloat).to(in.q.options());
  const auto both_passes = [&] {
    const at::Tensor out = attend(in);
    TensorList results = gradients({out}, {in.q, in.k, in.v, in.slopes}, {grad});
    results.push_back(out);
    return results;
  };
  TensorList recorded;
  at::cuda::CUDAGraph graph;
  capture(graph, [&] { recorded = both_passes(); });
  in.options.cu_seqlens_q()->copy_(at::tensor({0, 30, 400}));
  graph.replay();
  c10::cuda::device_synchronize();
  const TensorList expected = both_passes();
  for (size_t i = 0; i < expected.size(); ++i) {
    expect_same_bits(recorded[i], expected[i]);
  }
}

/// Sums over a part of the keys, with the lse of more keys.
TEST_F(AlibiAttentionTiledCuda, SumsForTheSlopesAreThoseOfFloat64) {
  for (const int64_t offset : {0, 448, -448, 100'000}) {
    SCOPED_TRACE(offset);
    AttentionCase c = self_attention(448);
    c.query_offset = offset;
    c.largest_slope = offset == 100'000 ? 0x1p-12 : 0.5;
    const AttentionInputs in = make_attention_inputs(c, {at::kCUDA, at::kBFloat16});
    const AttentionInputs wide = in_float64(in);
    const at::Tensor lse = std::get<1>(attend_with_lse(wide)).add(1);
    const at::Tensor grad = at::randn(in.q.sizes(), at::kFloat).to(in.q.options());
    const at::Tensor actual = slope_sums(in, grad, lse.to(at::kFloat));
    const at::Tensor expected = slope_sums(wide, grad.to(at::kDouble), lse);
    // Exponents have the rounding errors of dot products and of slope * distance in float32.
    const double largest = c.largest_slope * static_cast<double>(std::abs(offset) + c.q_len);
    for (int64_t sum = 0; sum < 4; ++sum) {
      EXPECT_LE(relative_error(actual[sum], expected[sum]), (64 + 4 * largest) * unit_roundoff(at::kFloat)) << sum;
    }
  }
}

}  // namespace
}  // namespace posenc::test
