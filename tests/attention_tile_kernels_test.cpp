#include <cpu/detail/attention_tiles.h>

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

// The arithmetic of attention on a CPU, for every instruction set that this machine has.
namespace posenc::test {
namespace {

using cpu::Range;

struct Level {
  std::string name;
  bool is_supported;
  const cpu::TileKernels<float>& (*of_float)(float);
  const cpu::TileKernels<double>& (*of_double)(double);
};

std::vector<Level> levels() {
  std::vector<Level> all{{"Portable", true, cpu::portable_tile_kernels, cpu::portable_tile_kernels}};
#ifdef POSENC_X86_64_TILES
  all.push_back({"Avx2", cpu::has_avx2(), cpu::avx2_tile_kernels, cpu::avx2_tile_kernels});
  all.push_back({"Avx512", cpu::has_avx512(), cpu::avx512_tile_kernels, cpu::avx512_tile_kernels});
#endif
  return all;
}

class AttentionTileKernels : public ::testing::TestWithParam<Level> {
 protected:
  void SetUp() override {
    if (!GetParam().is_supported) {
      GTEST_SKIP() << "this machine does not have " << GetParam().name;
    }
  }

  /// Calls `body` with the kernels for float and for double.
  template <typename Body>
  static void for_each_type(const Body& body) {
    body(GetParam().of_float(0), 0.0F);
    body(GetParam().of_double(0), 0.0);
  }
};

std::string level_name(const ::testing::TestParamInfo<Level>& info) {
  return info.param.name;
}

INSTANTIATE_TEST_SUITE_P(Cpu, AttentionTileKernels, ::testing::ValuesIn(levels()), level_name);

/// exp of each number, which is the probability of a score without bias and with lse 0.
template <typename Real>
std::vector<Real> exponentials(const cpu::TileKernels<Real>& kernels, std::vector<Real> x) {
  const size_t numbers = x.size();
  const auto width = static_cast<int>((numbers + kernels.panel - 1) / kernels.panel * kernels.panel);
  x.resize(width);
  std::vector<Real> dp(x.size());
  kernels.gradient_row({x.data(), {0, width}, width, 1, 0, 0}, {dp.data(), 0, 0, nullptr});
  x.resize(numbers);
  return x;
}

/// Random numbers that are multiples of 1/8 below 1, so that sums of a few hundred products are exact.
template <typename Real>
std::vector<Real> random_eighths(size_t size, std::mt19937& generator) {
  std::vector<Real> result(size);
  for (Real& x : result) {
    x = static_cast<Real>(static_cast<int>(generator() % 15) - 7) / 8;
  }
  return result;
}

TEST_P(AttentionTileKernels, ExponentialIsWithinTwoUnitsInTheLastPlace) {
  for_each_type([](const auto& kernels, auto zero) {
    using Real = decltype(zero);
    constexpr bool kDouble = std::is_same_v<Real, double>;
    constexpr long double kLowest = kDouble ? -708 : static_cast<float>(-86.9);
    constexpr long double kHighest = kDouble ? 709.782712893383973096L : 88.72283905206835L;
    constexpr int kNumbers = 1 << 18;
    std::vector<Real> x;
    for (int i = 0; i < kNumbers; ++i) {
      x.push_back(static_cast<Real>(kLowest + (kHighest - kLowest) * i / kNumbers));
    }
    for (const double tiny : {0.0, -0.0, 1e-30, -1e-30, 1e-8, -1e-8, 1e-4, -1e-4}) {
      x.push_back(static_cast<Real>(tiny));
    }
    const std::vector<Real> actual = exponentials(kernels, x);
    int wrong = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const long double expected = std::exp(static_cast<long double>(x[i]));
      const long double unit = std::ldexp(1.0L, std::ilogb(expected)) * std::numeric_limits<Real>::epsilon();
      wrong += std::abs(actual[i] - expected) <= 2 * unit ? 0 : 1;
      ASSERT_LT(wrong, 1) << "exp(" << x[i] << ") is " << actual[i] << ", expected " << expected;
    }
  });
}

TEST_P(AttentionTileKernels, ExponentialsOfEveryNumberOfElements) {
  std::mt19937 generator(0);
  for_each_type([&](const auto& kernels, auto zero) {
    using Real = decltype(zero);
    constexpr Real kShift = 2;
    for (int count = 0; count <= 150; ++count) {
      std::vector<Real> x = random_eighths<Real>(count + 1, generator);
      if (count > 2) {
        x[count / 2] = -std::numeric_limits<Real>::infinity();
        x[count / 3] = -1000;
      }
      const std::vector<Real> before = x;
      const Real sum = kernels.exponentials(x.data(), kShift, count);
      double expected = 0;
      for (int j = 0; j < count; ++j) {
        const double y = std::exp(static_cast<double>(before[j] - kShift));
        EXPECT_NEAR(x[j], y, 2 * std::numeric_limits<Real>::epsilon());
        expected += y;
      }
      EXPECT_EQ(x[count], before[count]);  // not written
      EXPECT_NEAR(sum, expected, (count + 4) * std::numeric_limits<Real>::epsilon() * expected);
      if (count > 0) {
        x[count - 1] = std::numeric_limits<Real>::quiet_NaN();
        EXPECT_TRUE(std::isnan(kernels.exponentials(x.data(), kShift, count)));
      }
    }
  });
}

/// Softcap of 1 of a score: the maximum of a row of one key.
template <typename Real>
Real hyperbolic_tangent(const cpu::TileKernels<Real>& kernels, Real x) {
  std::vector<Real> scores(kernels.panel);
  std::vector<Real> out(kernels.panel);
  scores[0] = x;
  cpu::SoftmaxRow<Real> row{-std::numeric_limits<Real>::infinity(), 0, out.data(), kernels.panel};
  kernels.softmax_row({scores.data(), {0, 1}, kernels.panel, 1, 0, 0, /*softcap=*/1}, row);
  return row.maximum;
}

TEST_P(AttentionTileKernels, HyperbolicTangentIsWithinFourUnitsInTheLastPlace) {
  for_each_type([](const auto& kernels, auto zero) {
    using Real = decltype(zero);
    constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
    for (int i = -30000; i <= 30000; ++i) {
      const auto x = static_cast<Real>(std::copysign(std::exp2(std::abs(i) / 1000.0 - 25), i));  // 2^-25 to 2^5
      const long double expected = std::tanh(static_cast<long double>(x));
      const long double unit = std::ldexp(1.0L, std::ilogb(expected)) * std::numeric_limits<Real>::epsilon();
      ASSERT_LE(std::abs(hyperbolic_tangent(kernels, x) - expected), 4 * unit) << "tanh(" << x << ")";
    }
    EXPECT_EQ(hyperbolic_tangent(kernels, Real(0)), 0);
    EXPECT_EQ(hyperbolic_tangent(kernels, kInfinity), 1);
    EXPECT_EQ(hyperbolic_tangent(kernels, -kInfinity), -1);
  });
}

TEST_P(AttentionTileKernels, GradientIsMultipliedByTheDerivativeOfSoftcap) {
  for_each_type([](const auto& kernels, auto zero) {
    using Real = decltype(zero);
    constexpr Real kSoftcap = 3;
    constexpr Real kScale = 2;
    constexpr Real kLse = 4;
    const int width = kernels.panel;
    const Range visible{1, width - 2};
    std::vector<Real> scores(width);
    for (int j = 0; j < width; ++j) {
      scores[j] = static_cast<Real>(j - 5) / 4;
    }
    scores[0] = scores[width - 1] = std::numeric_limits<Real>::quiet_NaN();  // hidden
    const std::vector<Real> before = scores;
    std::vector<Real> dp(width, 1);
    std::vector<Real> factors(width);
    const cpu::TileRow<Real> row{scores.data(), visible, width, kScale, 0, 0, kSoftcap};
    const cpu::GradientRow<Real> gradient{dp.data(), kLse, /*shift=*/0, factors.data()};
    kernels.gradient_row(row, gradient);
    const std::vector<Real> of_logits = dp;
    kernels.through_softcap(row, gradient);
    for (int j = 0; j < width; ++j) {
      const bool is_visible = j >= visible.begin && j < visible.end;
      const double tanh = std::tanh(static_cast<double>(kScale * before[j] / kSoftcap));
      const double p = is_visible ? std::exp(kSoftcap * tanh - kLse) : 0.0;
      const double bound = 32 * std::numeric_limits<Real>::epsilon();
      EXPECT_NEAR(scores[j], p, bound);
      EXPECT_NEAR(of_logits[j], p, bound);
      EXPECT_NEAR(dp[j], is_visible ? p * (1 - tanh * tanh) : 0.0, bound);
    }
  });
}

TEST_P(AttentionTileKernels, ExponentialBelowAndAboveTheRange) {
  for_each_type([](const auto& kernels, auto zero) {
    using Real = decltype(zero);
    constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
    std::vector<Real> low{-kInfinity, std::numeric_limits<Real>::lowest(), -1e6, -1e5, -1000, -745, -720, -709};
    std::vector<Real> high{kInfinity, std::numeric_limits<Real>::max(), 1e6, 1e5, 1000, 745, 720, 710};
    low.resize(32, -2000);
    high.resize(32, 2000);
    for (const Real x : exponentials(kernels, low)) {
      EXPECT_EQ(x, 0);
    }
    for (const Real x : exponentials(kernels, high)) {
      EXPECT_EQ(x, kInfinity);
    }
    std::vector<Real> nan(32, std::nan("12345"));
    nan[0] = -std::numeric_limits<Real>::quiet_NaN();
    for (const Real x : exponentials(kernels, nan)) {
      EXPECT_TRUE(std::isnan(x));
    }
  });
}

TEST_P(AttentionTileKernels, ProductIsExactForEveryNumberOfRows) {
  std::mt19937 generator(0);
  for_each_type([&](const auto& kernels, auto zero) {
    using Real = decltype(zero);
    constexpr int kDepth = 37;
    constexpr int kPanels = 3;
    const int columns = kPanels * kernels.panel;
    for (const bool transposed : {false, true}) {
      for (const bool accumulate : {false, true}) {
        for (int rows = 1; rows <= 27; ++rows) {
          const auto a = random_eighths<Real>(rows * kDepth, generator);
          const auto b = random_eighths<Real>(kDepth * columns, generator);
          auto c = random_eighths<Real>(rows * columns, generator);
          auto expected = c;
          const int64_t a_row = transposed ? 1 : kDepth;
          const int64_t a_depth = transposed ? rows : 1;
          for (int i = 0; i < rows; ++i) {
            for (int j = 0; j < columns; ++j) {
              Real sum = accumulate ? c[i * columns + j] : 0;
              for (int k = 0; k < kDepth; ++k) {
                const int at_b = (j / kernels.panel * kDepth + k) * kernels.panel + j % kernels.panel;
                sum += a[i * a_row + k * a_depth] * b[at_b];
              }
              expected[i * columns + j] = sum;
            }
          }
          kernels.product(
              {a.data(), a_row, a_depth, b.data(), kDepth * kernels.panel, c.data(), columns, rows, kPanels, kDepth,
               accumulate, nullptr, nullptr});
          ASSERT_EQ(c, expected) << rows << " rows";
        }
      }
    }
  });
}

TEST_P(AttentionTileKernels, ProductsWithRowsAreExactForEverySize) {
  std::mt19937 generator(0);
  for_each_type([&](const auto& kernels, auto zero) {
    using Real = decltype(zero);
    for (const int channels : {1, 3, 8, 21, 64, 100}) {
      for (const int count : {1, 2, 5, 33}) {
        for (int queries = 1; queries <= 9; ++queries) {
          const int stride = channels + 7;
          const auto q = random_eighths<Real>(queries * channels, generator);
          const auto rows = random_eighths<Real>(count * stride, generator);
          std::vector<Real> scores(queries * count);
          kernels.multiply_rows(
              {q.data(), channels, queries, rows.data(), stride, count, channels, scores.data(), count});
          const auto weights = random_eighths<Real>(queries * count, generator);
          auto sums = random_eighths<Real>(queries * channels, generator);
          auto expected = sums;
          for (int i = 0; i < queries; ++i) {
            for (int j = 0; j < count; ++j) {
              Real score = 0;
              for (int c = 0; c < channels; ++c) {
                score += q[i * channels + c] * rows[j * stride + c];
                expected[i * channels + c] += weights[i * count + j] * rows[j * stride + c];
              }
              ASSERT_EQ(scores[i * count + j], score) << queries << " x " << count << " x " << channels;
            }
          }
          kernels.add_rows(
              {weights.data(), count, queries, rows.data(), stride, count, channels, sums.data(), channels});
          ASSERT_EQ(sums, expected) << queries << " x " << count << " x " << channels;
        }
      }
    }
  });
}

TEST_P(AttentionTileKernels, ProductOfRangesIsThatOfZerosElsewhere) {
  std::mt19937 generator(0);
  for_each_type([&](const auto& kernels, auto zero) {
    using Real = decltype(zero);
    constexpr int kRows = 20;
    constexpr int kDepth = 50;
    const int columns = 2 * kernels.panel;
    auto a = random_eighths<Real>(kRows * kDepth, generator);
    const auto b = random_eighths<Real>(kDepth * columns, generator);
    std::vector<Range> depths(kRows);
    for (int i = 0; i < kRows; ++i) {
      depths[i] = {static_cast<int32_t>(generator() % kDepth), static_cast<int32_t>(generator() % kDepth)};
      for (int k = 0; k < kDepth; ++k) {
        a[i * kDepth + k] = k >= depths[i].begin && k < depths[i].end ? a[i * kDepth + k] : Real(0);
      }
    }
    std::vector<Real> all(kRows * columns);
    std::vector<Real> in_ranges(kRows * columns);
    cpu::Product<Real> product{a.data(),   kDepth,  1,      b.data(), kDepth * kernels.panel,
                               all.data(), columns, kRows,  2,        kDepth,
                               false,      nullptr, nullptr};
    kernels.product(product);
    product.c = in_ranges.data();
    product.depths = depths.data();
    kernels.product(product);
    EXPECT_EQ(in_ranges, all);
    // Columns that are not read may have any value.
    std::vector<Range> half(kRows, {kernels.panel, columns});
    product.columns = half.data();
    std::vector<Real> in_columns(kRows * columns);
    product.c = in_columns.data();
    kernels.product(product);
    for (int i = 0; i < kRows; ++i) {
      for (int j = kernels.panel; j < columns; ++j) {
        EXPECT_EQ(in_columns[i * columns + j], all[i * columns + j]);
      }
    }
  });
}

TEST_P(AttentionTileKernels, SoftmaxInTwoTilesIsThatOfTheRow) {
  std::mt19937 generator(0);
  for_each_type([&](const auto& kernels, auto zero) {
    using Real = decltype(zero);
    const int width = 2 * kernels.panel;
    constexpr double kSlope = 0.25;
    constexpr double kScale = 0.5;
    const Range visible[] = {{1, width}, {0, width - 3}};
    const double position = width + 2.0;
    std::vector<Real> scores = random_eighths<Real>(2 * width, generator);
    double sum = 0;
    double weighted = 0;
    std::vector<Real> out(kernels.panel);
    cpu::SoftmaxRow<Real> row{-std::numeric_limits<Real>::infinity(), 0, out.data(), kernels.panel};
    const std::vector<Real> before = scores;
    for (int tile = 0; tile < 2; ++tile) {
      kernels.softmax_row(
          {scores.data() + tile * width, visible[tile], width, kScale, kSlope,
           static_cast<Real>(position - tile * width)},
          row);
      for (int j = 0; j < width; ++j) {
        const int key = tile * width + j;
        const bool is_visible = j >= visible[tile].begin && j < visible[tile].end;
        EXPECT_TRUE(is_visible || scores[key] == 0);
        row.out[0] += scores[key] * static_cast<Real>(key);
        const double weight = is_visible ? std::exp(kScale * before[key] - kSlope * std::abs(position - key)) : 0.0;
        sum += weight;
        weighted += weight * key;
      }
    }
    const double bound = 100 * std::numeric_limits<Real>::epsilon();
    EXPECT_NEAR(row.maximum + std::log(row.sum), std::log(sum), bound);
    EXPECT_NEAR(row.out[0] / row.sum, weighted / sum, bound * 2 * width);
  });
}

}  // namespace
}  // namespace posenc::test
