#include "alibi_support.h"

#include <posenc/alibi.h>

#include <ATen/ATen.h>

#include <cmath>

// Operators of ALiBi over a grid of shapes, strides and flags, against the formulas in scalar loops.
namespace posenc::test {
namespace {

/// Cases that each change one aspect of a default call. Row lengths include those around the vector lengths of every
/// dtype: 2, 4 and 8 elements (16 bytes) on a GPU, up to 16 floats on the CPU.
std::vector<AlibiCase> grid() {
  std::vector<AlibiCase> cases;
  const auto add = [&cases](const std::string& name, const std::function<void(AlibiCase&)>& change) {
    AlibiCase c;
    c.name = name;
    change(c);
    cases.push_back(c);
  };
  add("Default", [](AlibiCase&) {});
  for (const int64_t keys : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 255, 256, 257}) {
    add("Keys" + std::to_string(keys), [=](AlibiCase& c) { c.k_len = keys; });
    add("Square" + std::to_string(keys) + "Causal", [=](AlibiCase& c) {
      c.batch = c.heads = 1;
      c.q_len = std::min<int64_t>(keys, 40);
      c.k_len = keys;
      c.causal = true;
    });
  }
  for (const auto& [queries, keys] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {1, 12}, {3, 12}, {12, 3}, {9, 1}, {16, 8}, {8, 16}}) {
    const std::string sizes = std::to_string(queries) + "By" + std::to_string(keys);
    const auto change = [q = queries, k = keys](AlibiCase& c) { c.q_len = q, c.k_len = k; };
    add(sizes, change);
    add(sizes + "Causal", [=](AlibiCase& c) {
      change(c);
      c.causal = true;
    });
  }
  for (const int64_t offset : {-12, -3, 0, 1, 4, 100}) {
    const std::string name = "Offset" + std::string(offset < 0 ? "Minus" : "") + std::to_string(std::abs(offset));
    add(name, [=](AlibiCase& c) { c.query_offset = offset; });
    add(name + "Causal", [=](AlibiCase& c) { c.query_offset = offset, c.causal = true; });
    add(name + "CausalMasked", [=](AlibiCase& c) {
      c.query_offset = offset;
      c.causal = c.masked = true;
      c.k_len = 16;
    });
  }
  for (const double scale : {0.125, -2.0, 0.0, 3.7}) {
    add("Scale" + std::to_string(cases.size()), [=](AlibiCase& c) { c.scale = scale; });
  }
  for (int mask = 0; mask < kMaskStrides; ++mask) {
    for (const int64_t keys : {7, 16, 64}) {
      add("Mask" + std::to_string(mask) + "Keys" + std::to_string(keys), [=](AlibiCase& c) {
        c.masked = true;
        c.mask_strides = static_cast<MaskStrides>(mask);
        c.k_len = keys;
        c.scale = 0.5;
      });
    }
  }
  add("EveryOtherSlope", [](AlibiCase& c) { c.every_other_slope = true; });
  add("OneHead", [](AlibiCase& c) { c.heads = 1; });
  add("ManyHeads", [](AlibiCase& c) { c.heads = 70, c.batch = 1; });
  add("ManyBatches", [](AlibiCase& c) { c.heads = 1, c.batch = 70; });
  for (const bool batched : {true, false}) {
    const std::string suffix = batched ? "" : "OfThreeDimensions";
    for (int strides = batched ? 1 : 0; strides < kStrides; ++strides) {
      for (const int64_t keys : {7, 16}) {
        add("Strides" + std::to_string(strides) + "Keys" + std::to_string(keys) + suffix, [=](AlibiCase& c) {
          c.batched = batched;
          c.k_len = keys;
          c.strides = static_cast<Strides>(strides);
        });
      }
      add("Strides" + std::to_string(strides) + "Causal" + suffix, [=](AlibiCase& c) {
        c.batched = batched;
        c.q_len = c.k_len = 8;
        c.strides = static_cast<Strides>(strides);
        c.causal = true;
        c.masked = batched;
      });
    }
  }
  return cases;
}

using GridParam = std::tuple<Target, AlibiCase>;

class AlibiGrid : public ::testing::TestWithParam<GridParam> {
 protected:
  void SetUp() override {
    require_device(target().device);
    if (IsSkipped() || HasFatalFailure()) {
      return;
    }
    inputs_ = make_alibi_inputs(std::get<1>(GetParam()), target());
  }

  const Target& target() const { return std::get<0>(GetParam()); }

  AlibiInputs inputs_;
};

TEST_P(AlibiGrid, BiasIsTheFormula) {
  const at::Tensor bias = bias_of(inputs_, target().dtype);
  EXPECT_EQ(bias.scalar_type(), target().dtype);
  EXPECT_EQ(bias.device(), inputs_.slopes.device());
  EXPECT_TRUE(bias.is_contiguous());
  expect_bias(bias, inputs_, inputs_.scores.size(-2), inputs_.scores.size(-1));
}

TEST_P(AlibiGrid, SumIsTheFormula) {
  expect_sum(add_of(inputs_), inputs_);
}

TEST_P(AlibiGrid, SumInPlaceHasTheSameBits) {
  // Expanded tensors cannot be written in place.
  at::Tensor scores =
      inputs_.scores.is_non_overlapping_and_dense() ? inputs_.scores.clone() : inputs_.scores.contiguous().clone();
  const at::Tensor expected = add_of(inputs_);
  posenc::alibi_add_(scores, inputs_.slopes, inputs_.causal, inputs_.query_offset);
  expect_same_bits(scores, expected);
}

TEST_P(AlibiGrid, SoftmaxIsTheFormula) {
  expect_softmax(softmax_of(inputs_), inputs_);
}

TEST_P(AlibiGrid, ResultsKeepADenseMemoryLayout) {
  for (const at::Tensor& y : {add_of(inputs_), softmax_of(inputs_)}) {
    EXPECT_EQ(y.strides(), at::empty_like(inputs_.scores).strides());
  }
}

std::string grid_name(const ::testing::TestParamInfo<GridParam>& info) {
  return std::string(at::toString(std::get<0>(info.param).dtype)) + std::get<1>(info.param).name;
}

INSTANTIATE_TEST_SUITE_P(
    Cpu,
    AlibiGrid,
    ::testing::Combine(::testing::ValuesIn(targets(at::kCPU)), ::testing::ValuesIn(grid())),
    grid_name);
INSTANTIATE_TEST_SUITE_P(
    Cuda,
    AlibiGrid,
    ::testing::Combine(::testing::ValuesIn(targets(at::kCUDA)), ::testing::ValuesIn(grid())),
    grid_name);

}  // namespace
}  // namespace posenc::test
