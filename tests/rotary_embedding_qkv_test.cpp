#include "gradcheck.h"
#include "rotary_embedding_qkv_support.h"

#include <posenc/reference.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>

namespace posenc::test {
namespace {

class RotaryEmbeddingQkv : public TargetTest {
 protected:
  /// Runs `body` for every case, in both forms of the projection.
  void for_each(const std::function<void(const Packed&)>& body) const {
    for (const RotaryCase& c : packed_cases()) {
      for (const bool stacked : {false, true}) {
        SCOPED_TRACE(::testing::Message() << c << (stacked ? ", stacked" : ""));
        body(make_packed(c, stacked, GetParam()));
      }
    }
  }

  at::Tensor random(at::IntArrayRef sizes) const { return random_tensor(sizes, GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryEmbeddingQkv, ::testing::ValuesIn(targets(at::kCPU)), target_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbeddingQkv, ::testing::ValuesIn(targets(at::kCUDA)), target_name);

TEST_P(RotaryEmbeddingQkv, RotatesQueriesAndKeysByTheScalarLoopAndCopiesValues) {
  for_each([](const Packed& p) {
    const auto [q, k, v] = split(p, p.qkv);
    const auto [q_in, k_in, v_in] = views(p, p.qkv);
    expect_within(q, scalar_rotation(p.in, q_in), rounding_bound(p.in, q_in));
    expect_within(k, scalar_rotation(p.in, k_in), rounding_bound(p.in, k_in));
    expect_same_bits(v, v_in);
    EXPECT_TRUE(q.is_contiguous() && k.is_contiguous() && v.is_contiguous());
    EXPECT_FALSE(v.is_alias_of(p.qkv));
  });
}

TEST_P(RotaryEmbeddingQkv, HasTheBitsOfTheRotationOfViews) {
  for_each([](const Packed& p) {
    const auto [q, k, v] = split(p, p.qkv);
    const auto [q_in, k_in, v_in] = views(p, p.qkv);
    expect_same_bits(q, rotate(p.in, q_in));
    expect_same_bits(k, rotate(p.in, k_in));
  });
}

TEST_P(RotaryEmbeddingQkv, PackIsTheRotationOfEachPartJoined) {
  for_each([this](const Packed& p) {
    const auto [q_in, k_in, v_in] = views(p, p.qkv);
    const at::Tensor q = random(q_in.sizes());
    const at::Tensor k = random(k_in.sizes());
    const at::Tensor v = random(v_in.sizes());
    const at::Tensor packed = pack(p, q, k, v);
    EXPECT_TRUE(packed.is_contiguous());
    expect_same_bits(packed, joined(p, rotate(p.in, q), rotate(p.in, k), v));
    // Views with any strides are accepted.
    expect_same_bits(pack(p, q_in, k_in, v_in), joined(p, rotate(p.in, q_in), rotate(p.in, k_in), v_in));
  });
}

TEST_P(RotaryEmbeddingQkv, StridesDoNotChangeTheResult) {
  const RotaryCase c;
  for (int i = 0; i < kStrides; ++i) {
    SCOPED_TRACE(i);
    const Packed p = make_packed(c, /*stacked=*/true, GetParam(), static_cast<Strides>(i));
    const Parts actual = split(p, p.qkv);
    const Parts expected = split(p, p.qkv.contiguous());
    expect_same_bits(std::get<0>(actual), std::get<0>(expected));
    expect_same_bits(std::get<1>(actual), std::get<1>(expected));
    expect_same_bits(std::get<2>(actual), std::get<2>(expected));
    const at::Tensor q = random_tensor(c.sizes(c.q_heads), GetParam(), static_cast<Strides>(i));
    expect_same_bits(pack(p, q, q, q), pack(p, q.contiguous(), q.contiguous(), q.contiguous()));
  }
  const Packed p = make_packed(c, /*stacked=*/false, GetParam());
  const at::Tensor wide = random({2, 5, 2 * p.qkv.size(-1)});
  for (const at::Tensor& qkv :
       {wide.narrow(-1, 3, p.qkv.size(-1)), wide.slice(-1, 0, wide.size(-1), 2), wide.narrow(-1, 0, p.qkv.size(-1)),
        p.qkv.transpose(0, 1).contiguous().transpose(0, 1), p.qkv.narrow(-1, 0, 1).expand_as(p.qkv)}) {
    expect_same_bits(std::get<0>(split(p, qkv)), std::get<0>(split(p, qkv.contiguous())));
    expect_same_bits(std::get<2>(split(p, qkv)), std::get<2>(split(p, qkv.contiguous())));
  }
}

TEST_P(RotaryEmbeddingQkv, BackwardPacksTheConjugateRotation) {
  for_each([this](const Packed& p) {
    const at::Tensor qkv = p.qkv.detach().requires_grad_();
    const auto [q, k, v] = split(p, qkv);
    const TensorList grads{random(q.sizes()), random(k.sizes()), random(v.sizes())};
    const RotaryInputs back = backwards(p.in);
    expect_same_bits(
        gradients({q, k, v}, {qkv}, grads)[0], joined(p, rotate(back, grads[0]), rotate(back, grads[1]), grads[2]));
  });
}

TEST_P(RotaryEmbeddingQkv, BackwardOfPackSplitsByTheConjugateRotation) {
  for_each([this](const Packed& p) {
    TensorList leaves;
    const auto [q_in, k_in, v_in] = views(p, p.qkv);
    for (const at::Tensor& part : {q_in, k_in, v_in}) {
      leaves.push_back(part.detach().clone().requires_grad_());
    }
    const at::Tensor packed = pack(p, leaves[0], leaves[1], leaves[2]);
    const at::Tensor grad = random(packed.sizes());
    const TensorList found = gradients({packed}, leaves, {grad});
    const auto [q, k, v] = split(backwards(p), grad);
    expect_same_bits(found[0], q);
    expect_same_bits(found[1], k);
    expect_same_bits(found[2], v);
  });
}

TEST_P(RotaryEmbeddingQkv, BackwardIsTheAdjointOfForward) {
  for_each([this](const Packed& p) {
    const at::Tensor qkv = p.qkv.detach().requires_grad_();
    const auto [q, k, v] = split(p, qkv);
    const TensorList grads{random(q.sizes()), random(k.sizes()), random(v.sizes())};
    const at::Tensor gradient = gradients({q, k, v}, {qkv}, grads)[0];
    const RotaryInputs back = backwards(p.in);
    const auto [q_in, k_in, v_in] = views(p, p.qkv);
    double tolerance = 0x1p-40;
    for (const auto& [x, g] : {std::pair(q_in, grads[0]), std::pair(k_in, grads[1])}) {
      tolerance += inner_product(rounding_bound(p.in, x), g.abs()) + inner_product(rounding_bound(back, g), x.abs());
    }
    const double forward = inner_product(q, grads[0]) + inner_product(k, grads[1]) + inner_product(v, grads[2]);
    EXPECT_NEAR(forward, inner_product(qkv, gradient), tolerance);
  });
}

TEST_P(RotaryEmbeddingQkv, TableGradientsMatchTheScalarLoop) {
  for_each([this](const Packed& p) {
    Packed leaves = p;
    leaves.in.cos = p.in.cos.detach().requires_grad_();
    leaves.in.sin = p.in.sin.detach().requires_grad_();
    const auto [q_in, k_in, v_in] = views(p, p.qkv);
    const auto [q, k, v] = split(leaves, p.qkv);
    const TensorList grads{random(q.sizes()), random(k.sizes()), random(v.sizes())};
    const TensorList of_split = gradients({q, k, v}, {leaves.in.cos, leaves.in.sin}, grads);
    expect_table_gradients(
        of_split[0], of_split[1], scalar_table_gradients(p.in, {{grads[0], q_in}, {grads[1], k_in}}));

    const at::Tensor packed = pack(leaves, q_in, k_in, v_in);
    const at::Tensor grad = random(packed.sizes());
    const TensorList of_pack = gradients({packed}, {leaves.in.cos, leaves.in.sin}, {grad});
    const auto [grad_q, grad_k, grad_v] = views(p, grad);
    expect_table_gradients(of_pack[0], of_pack[1], scalar_table_gradients(p.in, {{grad_q, q_in}, {grad_k, k_in}}));
  });
}

TEST_P(RotaryEmbeddingQkv, OutputsThatAreNotUsedHaveGradientsOfZero) {
  const Packed p = make_packed(RotaryCase(), false, GetParam());
  const at::Tensor qkv = p.qkv.detach().requires_grad_();
  const auto [q, k, v] = split(p, qkv);
  const at::Tensor grad_k = random(k.sizes());
  // Compared by value, as a rotated zero may be negative.
  EXPECT_TRUE(at::equal(
      gradients({k}, {qkv}, {grad_k})[0],
      joined(p, at::zeros_like(q), rotate(backwards(p.in), grad_k), at::zeros_like(v))));
  const at::Tensor grad_v = random(v.sizes());
  EXPECT_TRUE(at::equal(
      gradients({v}, {qkv}, {grad_v})[0].narrow(-1, 0, (p.q_heads + p.kv_heads) * 16),
      at::zeros({2, 5, (p.q_heads + p.kv_heads) * 16}, qkv.options())));
}

TEST_P(RotaryEmbeddingQkv, PositionOutsideTheTableLeavesTheValues) {
  for (const int64_t head_dim : {16, 24}) {
    RotaryCase c;
    c.head_dim = head_dim;
    Packed p = make_packed(c, false, GetParam());
    for (const int64_t outside : positions_outside(p.in.cos.size(0))) {
      SCOPED_TRACE(outside);
      p.in.positions = at::tensor({int64_t{0}, int64_t{1}, outside, int64_t{3}, int64_t{4}}, at::kLong).to(device());
      const auto [q, k, v] = split(p, p.qkv);
      EXPECT_TRUE(q.select(1, 2).isnan().all().item<bool>());
      EXPECT_TRUE(k.select(1, 2).isnan().all().item<bool>());
      expect_same_bits(v, std::get<2>(views(p, p.qkv)));
    }
  }
}

TEST_P(RotaryEmbeddingQkv, EmptyTensorsWork) {
  for (const bool no_batch : {false, true}) {
    RotaryCase c;
    (no_batch ? c.batch : c.tokens) = 0;
    const Packed p = make_packed(c, false, GetParam());
    const at::Tensor qkv = p.qkv.detach().requires_grad_();
    const auto [q, k, v] = split(p, qkv);
    EXPECT_EQ(q.sizes(), at::IntArrayRef(c.sizes(4)));
    EXPECT_EQ(v.sizes(), at::IntArrayRef(c.sizes(2)));
    (q.sum() + k.sum() + v.sum()).backward();
    EXPECT_EQ(qkv.grad().sizes(), qkv.sizes());
  }
}

TEST_P(RotaryEmbeddingQkv, ReferenceIsTheSame) {
  for_each([](const Packed& p) {
    const RotaryInputs& in = p.in;
    const auto [q, k, v] = posenc::reference::rotary_embedding_qkv(
        p.qkv, p.q_heads, p.kv_heads, in.cos, in.sin, in.positions, in.interleaved, in.conjugate, in.pair_axes);
    const auto [q_in, k_in, v_in] = views(p, p.qkv);
    expect_same_bits(q, rotate_reference(in, q_in));
    expect_same_bits(k, rotate_reference(in, k_in));
    expect_same_bits(v, v_in);
    expect_same_bits(
        posenc::reference::rotary_embedding_pack(
            q_in, k_in, v_in, in.cos, in.sin, in.positions, p.stacked, in.interleaved, in.conjugate, in.pair_axes),
        joined(p, q, k, v));
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Derivatives in float64, errors

class RotaryEmbeddingQkvCalls : public DeviceTest {};

INSTANTIATE_TEST_SUITE_P(Cpu, RotaryEmbeddingQkvCalls, ::testing::Values(at::kCPU), device_name);
INSTANTIATE_TEST_SUITE_P(Cuda, RotaryEmbeddingQkvCalls, ::testing::Values(at::kCUDA), device_name);

TEST_P(RotaryEmbeddingQkvCalls, DerivativesMatchCentralDifferences) {
  for (const bool stacked : {false, true}) {
    RotaryCase c;
    c.batch = 1;
    c.tokens = 2;
    c.q_heads = 2;
    c.k_heads = 1;
    c.head_dim = 5;
    c.rotary_dim = 4;
    c.spare_rows = 0;
    c.positions = PositionShape::per_batch;
    c.axes = stacked ? 2 : 0;
    Packed p = make_packed(c, stacked, {GetParam(), at::kDouble});
    const Differentiable splits = [&p](const TensorList& x) -> TensorList {
      Packed at_point = p;
      at_point.in.cos = x[1];
      at_point.in.sin = x[2];
      const auto [q, k, v] = split(at_point, x[0]);
      return {q, k, v};
    };
    const Differentiable packs = [&p](const TensorList& x) -> TensorList {
      Packed at_point = p;
      at_point.in.cos = x[3];
      at_point.in.sin = x[4];
      return {pack(at_point, x[0], x[1], x[2])};
    };
    const auto leaf = [](const at::Tensor& x) { return x.detach().clone().requires_grad_(); };
    const TensorList of_splits{leaf(p.qkv), leaf(p.in.cos), leaf(p.in.sin)};
    gradcheck(splits, of_splits);
    gradgradcheck(splits, of_splits);
    const auto [q, k, v] = views(p, p.qkv);
    const TensorList of_packs{leaf(q), leaf(k), leaf(v), leaf(p.in.cos), leaf(p.in.sin)};
    gradcheck(packs, of_packs);
    gradgradcheck(packs, of_packs);
  }
}

TEST_P(RotaryEmbeddingQkvCalls, ProjectionsThatDoNotFitAreErrors) {
  const Packed p = make_packed(RotaryCase(), false, {GetParam(), at::kFloat});
  const auto expect_rejected = [&](const at::Tensor& qkv, int64_t q_heads, int64_t kv_heads,
                                   std::vector<std::string> parts) {
    parts.emplace_back("posenc::rotary_embedding_qkv: ");
    Packed bad = p;
    bad.q_heads = q_heads;
    bad.kv_heads = kv_heads;
    expect_error([&] { split(bad, qkv); }, parts);
  };
  expect_rejected(at::Tensor(), 4, 2, {"expected qkv", "undefined"});
  expect_rejected(p.qkv[0][0], 4, 2, {"expected qkv of shape", "[B, S, (Hq + 2 Hk) D]", "got [128]"});
  expect_rejected(p.qkv, 3, 2, {"multiple of num_q_heads + 2 num_kv_heads", "Hq = 3 and Hk = 2", "got [2, 5, 128]"});
  expect_rejected(p.qkv, 0, 2, {"num_q_heads and num_kv_heads of at least 1", "got 0 and 2"});
  expect_rejected(p.qkv, 4, -1, {"num_q_heads and num_kv_heads of at least 1", "got 4 and -1"});
  expect_rejected(p.qkv, 1LL << 62, 1LL << 62, {"multiple of num_q_heads + 2 num_kv_heads"});
  expect_rejected(p.qkv, 64, 32, {"rotary width", "got 16"});
  const at::Tensor stacked = at::zeros({2, 5, 3, 4, 16}, p.qkv.options());
  expect_rejected(stacked, 4, 2, {"[.., 3, H, D]", "got [2, 5, 3, 4, 16], 4 and 2"});
  expect_rejected(stacked, 5, 5, {"[.., 3, H, D]", "5 and 5"});
  expect_rejected(stacked.narrow(2, 0, 2), 4, 4, {"[.., 3, H, D]", "got [2, 5, 2, 4, 16]"});
  expect_rejected(p.qkv.to(at::kInt), 4, 2, {"expected qkv", "float16, bfloat16, float32 or float64", "Int"});
  expect_rejected(p.qkv.to(at::kDouble), 4, 2, {"expected cos", "for qkv of dtype Double"});
}

TEST_P(RotaryEmbeddingQkvCalls, PartsThatDoNotFitAreErrors) {
  Packed p = make_packed(RotaryCase(), false, {GetParam(), at::kFloat});
  const auto [q, k, v] = views(p, p.qkv);
  const auto expect_rejected = [&](const at::Tensor& bad_q, const at::Tensor& bad_k, const at::Tensor& bad_v,
                                   std::vector<std::string> parts) {
    parts.emplace_back("posenc::rotary_embedding_pack: ");
    expect_error([&] { pack(p, bad_q, bad_k, bad_v); }, parts);
  };
  expect_rejected(q, k, at::Tensor(), {"expected v", "undefined"});
  expect_rejected(q, k, q, {"expected v of the shape", "[2, 5, 2, 16]", "got [2, 5, 4, 16]"});
  expect_rejected(q, k, v.to(at::kHalf), {"expected v", "Float", "Half"});
  expect_rejected(q, k.narrow(1, 0, 2), v, {"expected k"});
  p.stacked = true;
  expect_rejected(q, k, v, {"as many heads where they are stacked", "[2, 5, 4, 16] and [2, 5, 2, 16]"});
}

TEST(RotaryEmbeddingQkvMeta, OutputsHaveTheShapesOfTheCpu) {
  for (const RotaryCase& c : packed_cases()) {
    for (const bool stacked : {false, true}) {
      SCOPED_TRACE(::testing::Message() << c);
      const Packed meta = make_packed(c, stacked, {at::kMeta, at::kFloat});
      const Packed cpu = make_packed(c, stacked, {at::kCPU, at::kFloat});
      const auto [q, k, v] = split(meta, meta.qkv);
      const auto [cpu_q, cpu_k, cpu_v] = split(cpu, cpu.qkv);
      EXPECT_TRUE(q.is_meta());
      EXPECT_EQ(q.sizes(), cpu_q.sizes());
      EXPECT_EQ(k.sizes(), cpu_k.sizes());
      EXPECT_EQ(v.sizes(), cpu_v.sizes());
      EXPECT_EQ(q.strides(), cpu_q.strides());
      const at::Tensor packed = pack(meta, q, k, v);
      EXPECT_EQ(packed.sizes(), cpu.qkv.sizes());
      EXPECT_TRUE(packed.is_contiguous());
    }
  }
  const Packed p = make_packed(RotaryCase(), false, {at::kMeta, at::kFloat});
  expect_error([&] { posenc::rotary_embedding_qkv(p.qkv, 3, 2, p.in.cos, p.in.sin); }, {"multiple of num_q_heads"});
}

}  // namespace
}  // namespace posenc::test
