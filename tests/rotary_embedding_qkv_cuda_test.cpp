#include "cuda_support.h"
#include "gradcheck.h"
#include "rotary_embedding_qkv_support.h"

#include <ATen/ATen.h>

// rotary_embedding_qkv on a GPU: launches, graphs and sizes.
namespace posenc::test {
namespace {

class RotaryEmbeddingQkvCuda : public ::testing::Test {
 protected:
  void SetUp() override { require_device(at::kCUDA); }
};

TEST_F(RotaryEmbeddingQkvCuda, ForwardAndBackwardAreOneKernelEachAndReplay) {
  require_caching_allocator();
  if (IsSkipped()) {
    return;
  }
  for (const bool stacked : {false, true}) {
    const Packed p = make_packed(RotaryCase(), stacked, {at::kCUDA, at::kBFloat16});
    const at::Tensor qkv = p.qkv.detach().requires_grad_();
    EXPECT_EQ(recorded_nodes([&] { split(p, qkv); }), (NodeCounts{{cudaGraphNodeTypeKernel, 1}}));
    const Parts shapes = split(p, p.qkv);  // of a tensor without grad: a graph would bind qkv to this stream
    const TensorList grads{
        at::randn_like(std::get<0>(shapes)), at::randn_like(std::get<1>(shapes)), at::randn_like(std::get<2>(shapes))};
    at::Tensor found;
    const auto run = [&] {
      const auto [q, k, v] = split(p, qkv);
      found = gradients({q, k, v}, {qkv}, grads)[0];
    };
    EXPECT_EQ(recorded_nodes(run), (NodeCounts{{cudaGraphNodeTypeKernel, 2}}));
    at::cuda::CUDAGraph graph;
    capture(graph, run);
    grads[0].neg_();
    grads[2].mul_(2);
    c10::cuda::device_synchronize();
    graph.replay();
    c10::cuda::device_synchronize();
    const at::Tensor replayed = found.clone();
    run();
    expect_same_bits(replayed, found);
  }
}

TEST_F(RotaryEmbeddingQkvCuda, MoreThan65535SequencesWork) {
  RotaryCase c;
  c.batch = 70'000;
  c.tokens = c.q_heads = c.k_heads = 1;
  c.head_dim = c.rotary_dim = 4;
  for (const int64_t axes : {0, 2}) {
    c.positions = PositionShape::per_batch;
    c.axes = axes;
    const Packed p = make_packed(c, false, {at::kCUDA, at::kFloat});
    const auto [q, k, v] = split(p, p.qkv);
    const auto [q_in, k_in, v_in] = views(p, p.qkv);
    expect_close_to_rounding(q, p.in, q_in);
    expect_close_to_rounding(k, p.in, k_in);
    expect_same_bits(v, v_in);
    expect_same_bits(pack(backwards(p), q, k, v).narrow(-1, 8, 4), v_in.flatten(-2));
  }
}

TEST_F(RotaryEmbeddingQkvCuda, MoreThanTwoToThe31ElementsWork) {
  if (const std::string reason = too_large(16); !reason.empty()) {
    GTEST_SKIP() << reason;
  }
  constexpr int64_t heads = 4;
  constexpr int64_t head_dim = 128;
  constexpr int64_t tokens = (int64_t{1} << 31) / (3 * heads * head_dim) + 5;
  const auto options = at::TensorOptions(at::kBFloat16).device(at::kCUDA);
  Packed p{{}, at::empty({tokens, 3 * heads * head_dim}, options), heads, heads, false};
  ASSERT_GT(p.qkv.numel(), int64_t{1} << 31);
  p.qkv.normal_();
  p.in.cos = at::randn({1009, head_dim / 2}).to(at::kCUDA);
  p.in.sin = at::randn({1009, head_dim / 2}).to(at::kCUDA);
  const at::Tensor positions = at::arange(tokens, options.dtype(at::kLong)).remainder(1009);
  p.in.positions = positions;
  const auto expect_part = [&](const RotaryInputs& in, const at::Tensor& actual, const at::Tensor& from) {
    for (const int64_t begin : {int64_t{0}, tokens / 2 - 8, tokens - 16}) {
      RotaryInputs part = in;
      part.positions = positions.narrow(0, begin, 16);
      expect_close_to_rounding(actual.narrow(0, begin, 16), part, from.narrow(0, begin, 16));
    }
  };
  const auto [q, k, v] = split(p, p.qkv);
  const auto [q_in, k_in, v_in] = views(p, p.qkv);
  expect_part(p.in, q, q_in);
  expect_part(p.in, k, k_in);
  EXPECT_TRUE(at::equal(v, v_in));
  const at::Tensor packed = pack(backwards(p), q, k, v);
  const auto [q_back, k_back, v_back] = views(p, packed);
  expect_part(backwards(p.in), q_back, q);
  expect_part(backwards(p.in), k_back, k);
  EXPECT_TRUE(at::equal(v_back, v));
}

}  // namespace
}  // namespace posenc::test
