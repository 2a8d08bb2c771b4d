#pragma once

#include <posenc/export.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

/// Inverse frequencies of rotary embeddings, the plans that scale them for longer contexts, and the tables that the
/// operators read. Everything here is computed in float64.
namespace posenc {

/// `base^(-2i/R)` for `i = 0 .. R/2 - 1` (RoFormer, Su et al. 2021, section 3.2.2).
///
/// @param rotary_dim  R: positive and even.
/// @param base  positive and finite; 10000 in the paper, `rope_theta` in model configurations.
/// @return float64 `[R/2]` on the CPU.
POSENC_API at::Tensor rotary_inv_freq(int64_t rotary_dim, double base = 10000.0);

/// Inverse frequencies, and a factor of the tables.
struct RotaryFrequencies {
  at::Tensor inv_freq;            ///< float64 `[R/2]` on the CPU, in radians per position.
  double attention_factor = 1.0;  ///< Multiplies cos and sin, so q and k, and the scores by its square.
};

// --- Plans ----------------------------------------------------------------------------------------------------
// Below, w_i = base^(-2i/R) are the inverse frequencies without a plan, w'_i those of the plan, and s is `factor`.
// Factors and lengths must be positive and finite. A field that is initially 0 or empty must be set.

/// No plan: w' = w.
struct DefaultScaling {
  friend bool operator==(const DefaultScaling& /*a*/, const DefaultScaling& /*b*/) { return true; }
};

/// Position interpolation (Chen et al. 2023, https://arxiv.org/abs/2306.15595): w' = w / s.
struct LinearScaling {
  double factor = 1.0;

  friend bool operator==(const LinearScaling& a, const LinearScaling& b) { return a.factor == b.factor; }
};

/// Dynamic NTK (Peng et al. 2023, https://arxiv.org/abs/2309.00071, appendix B.2, as `dynamic` in transformers): the
/// base grows with the length of the sequence,
///
///     n = max(seq_len, L),    base' = base (s n/L - (s - 1))^(R/(R-2)),
///
/// where L is `max_position_embeddings`. Up to L positions the base is unchanged. R is at least 4.
struct DynamicNtkScaling {
  double factor = 1.0;
  int64_t max_position_embeddings = 0;
  /// A length beyond L is rounded up to a multiple of this. With 1, the published rule, every length has different
  /// frequencies, and a cache that grows by one token in each step needs new tables in each step. With 256 it needs new
  /// tables in every 256th step. Default: 1.
  int64_t seq_len_multiple = 1;

  friend bool operator==(const DynamicNtkScaling& a, const DynamicNtkScaling& b) {
    return std::tie(a.factor, a.max_position_embeddings, a.seq_len_multiple) ==
        std::tie(b.factor, b.max_position_embeddings, b.seq_len_multiple);
  }
};

/// NTK-aware scaling with a fixed factor: base' = base s^(R/(R-2)). R is at least 4.
struct StaticNtkScaling {
  double factor = 1.0;

  friend bool operator==(const StaticNtkScaling& a, const StaticNtkScaling& b) { return a.factor == b.factor; }
};

/// YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3.2). With L0 =
/// `original_max_position_embeddings` and c(b) = R ln(L0 / (2 pi b)) / (2 ln base), the index of the pair that turns b
/// times in L0 positions,
///
///     lo = max(floor(c(beta_fast)), 0),    hi = min(ceil(c(beta_slow)), R - 1),    hi += 0.001 if lo = hi,
///     g_i = clamp((i - lo)/(hi - lo), 0, 1),    w' = g w/s + (1 - g) w.
///
/// The base is greater than 1. DeepSeek's models also multiply the scale of the softmax by the square of
/// `0.1 mscale_all_dim ln s + 1`. The tables do not contain this factor; attention must apply it.
struct YarnScaling {
  double factor = 1.0;
  int64_t original_max_position_embeddings = 0;
  double beta_fast = 32.0;  ///< Pairs that turn more often are unchanged. At least `beta_slow`.
  double beta_slow = 1.0;   ///< Pairs that turn less often are interpolated.
  bool truncate = true;     ///< Apply floor and ceil in lo and hi.
  /// Default: m(mscale)/m(mscale_all_dim) if both are set and not zero, else m(1), where m(k) = 0.1 k ln s + 1, or 1 if
  /// s is at most 1. `mscale` and `mscale_all_dim` are finite and not negative.
  std::optional<double> attention_factor = std::nullopt;
  std::optional<double> mscale = std::nullopt;
  std::optional<double> mscale_all_dim = std::nullopt;

  friend bool operator==(const YarnScaling& a, const YarnScaling& b) {
    const auto fields = [](const YarnScaling& x) {
      return std::tie(
          x.factor, x.original_max_position_embeddings, x.beta_fast, x.beta_slow, x.truncate, x.attention_factor,
          x.mscale, x.mscale_all_dim);
    };
    return fields(a) == fields(b);
  }
};

/// The plan of Llama 3.1 (`apply_scaling` of https://github.com/meta-llama/llama-models). With the wavelength
/// lam = 2 pi/w and L0 = `original_max_position_embeddings`: w' = w if lam < L0/high_freq_factor, w' = w/s if
/// lam > L0/low_freq_factor, and between them
///
///     t = (L0/lam - low_freq_factor)/(high_freq_factor - low_freq_factor),    w' = (1 - t) w/s + t w.
struct Llama3Scaling {
  double factor = 8.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;  ///< At least `low_freq_factor`.
  int64_t original_max_position_embeddings = 8192;

  friend bool operator==(const Llama3Scaling& a, const Llama3Scaling& b) {
    const auto fields = [](const Llama3Scaling& x) {
      return std::tie(x.factor, x.low_freq_factor, x.high_freq_factor, x.original_max_position_embeddings);
    };
    return fields(a) == fields(b);
  }
};

/// LongRoPE (Ding et al. 2024, https://arxiv.org/abs/2402.13753): w'_i = w_i / e_i, where e is `long_factor` for
/// sequences of more than L0 = `original_max_position_embeddings` positions, else `short_factor`.
struct LongRopeScaling {
  std::vector<double> short_factor;  ///< R/2 divisors.
  std::vector<double> long_factor;   ///< R/2 divisors.
  int64_t original_max_position_embeddings = 0;
  /// s. Default: `max_position_embeddings` / L0.
  std::optional<double> factor = std::nullopt;
  /// Number of positions that the model was extended to. Required unless `factor` or both attention factors are set.
  std::optional<int64_t> max_position_embeddings = std::nullopt;
  /// Default of both: sqrt(1 + ln s / ln L0), or 1 if s is at most 1.
  std::optional<double> short_attention_factor = std::nullopt;
  std::optional<double> long_attention_factor = std::nullopt;

  friend bool operator==(const LongRopeScaling& a, const LongRopeScaling& b) {
    const auto fields = [](const LongRopeScaling& x) {
      return std::tie(
          x.short_factor, x.long_factor, x.original_max_position_embeddings, x.factor, x.max_position_embeddings,
          x.short_attention_factor, x.long_attention_factor);
    };
    return fields(a) == fields(b);
  }
};

/// Partial rotation over the full head (`proportional` in transformers, as in Gemma 4): with p =
/// `partial_rotary_factor` and r = floor(p R/2), w'_i = w_i/s for i < r, and 0 for the other pairs, which are therefore
/// not rotated. R is the head size.
struct ProportionalScaling {
  double partial_rotary_factor = 1.0;  ///< 0 to 1.
  double factor = 1.0;

  friend bool operator==(const ProportionalScaling& a, const ProportionalScaling& b) {
    return a.partial_rotary_factor == b.partial_rotary_factor && a.factor == b.factor;
  }
};

/// Any plan.
using RotaryScaling = std::variant<
    DefaultScaling,
    LinearScaling,
    DynamicNtkScaling,
    StaticNtkScaling,
    YarnScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling>;

/// The frequencies of a plan.
///
/// @param rotary_dim  R: positive and even.
/// @param base  positive and finite; `rope_theta` in model configurations.
/// @param seq_len  length of the sequence, not negative. Only dynamic NTK and LongRoPE read it.
/// @throws c10::Error  naming the plan and its field, what was expected and what came.
///
/// Example:
/// ```
/// posenc::YarnScaling yarn;
/// yarn.factor = 4;
/// yarn.original_max_position_embeddings = 32768;
/// auto [inv_freq, attention_factor] = posenc::rotary_frequencies(128, 1e6, yarn);
/// auto [cos, sin] = posenc::rotary_tables(inv_freq, 131072, at::kFloat, attention_factor);
/// ```
POSENC_API RotaryFrequencies rotary_frequencies(int64_t rotary_dim, double base, const DefaultScaling& scaling);
POSENC_API RotaryFrequencies rotary_frequencies(int64_t rotary_dim, double base, const LinearScaling& scaling);
POSENC_API RotaryFrequencies
rotary_frequencies(int64_t rotary_dim, double base, const DynamicNtkScaling& scaling, int64_t seq_len);
POSENC_API RotaryFrequencies rotary_frequencies(int64_t rotary_dim, double base, const StaticNtkScaling& scaling);
POSENC_API RotaryFrequencies rotary_frequencies(int64_t rotary_dim, double base, const YarnScaling& scaling);
POSENC_API RotaryFrequencies rotary_frequencies(int64_t rotary_dim, double base, const Llama3Scaling& scaling);
POSENC_API RotaryFrequencies
rotary_frequencies(int64_t rotary_dim, double base, const LongRopeScaling& scaling, int64_t seq_len);
POSENC_API RotaryFrequencies rotary_frequencies(int64_t rotary_dim, double base, const ProportionalScaling& scaling);
POSENC_API RotaryFrequencies
rotary_frequencies(int64_t rotary_dim, double base, const RotaryScaling& scaling, int64_t seq_len = 0);

/// A key for the frequencies of a plan: lengths `seq_len` with the same key have the same frequencies.
///
/// @return dynamic NTK: n, see `DynamicNtkScaling`. LongRoPE: L0 for the short factors, L0 + 1 for the long ones.
///   All other plans: 0.
/// @throws c10::Error  for lengths of dynamic NTK that are not positive, or n of 2^63 or more.
POSENC_API int64_t rotary_frequency_length(const RotaryScaling& scaling, int64_t seq_len);

/// Whether the frequencies of a plan depend on the length of the sequence: dynamic NTK and LongRoPE.
POSENC_API bool depends_on_length(const RotaryScaling& scaling);

/// The name of a plan, as in model configurations, and its fields: `linear(factor=4)`.
POSENC_API std::string to_string(const RotaryScaling& scaling);

/// Scales of xPos (Sun et al. 2022, https://arxiv.org/abs/2212.10554): z_i^((t - floor(n/2))/scale_base) with
/// z_i = (2i + 0.4 R)/(1.4 R), for the tokens t = 0 .. n - 1 of a causal model. xPos multiplies queries by the scales
/// and divides keys by them: multiply cos and sin for q by the scales, and divide cos and sin for k by them.
///
/// @param rotary_dim  R: positive and even.
/// @param length  n: number of positions, not negative.
/// @param scale_base  positive. Default: 512, as in the paper.
/// @return float64 `[n, R/2]` on the CPU.
///
/// Example:
/// ```
/// at::Tensor scales = posenc::rotary_xpos_scales(128, 2048);
/// auto [cos, sin] = posenc::rotary_tables(posenc::rotary_inv_freq(128), 2048, at::kDouble);
/// auto q_rotated = posenc::rotary_embedding(q, (cos * scales).to(at::kFloat), (sin * scales).to(at::kFloat));
/// auto k_rotated = posenc::rotary_embedding(k, (cos / scales).to(at::kFloat), (sin / scales).to(at::kFloat));
/// ```
POSENC_API at::Tensor rotary_xpos_scales(int64_t rotary_dim, int64_t length, double scale_base = 512.0);

// --- Tables ---------------------------------------------------------------------------------------------------

/// The dtype of the tables that operators require for tensors of `dtype`: float64 for float64, float32 for all others.
POSENC_API at::ScalarType rotary_table_dtype(at::ScalarType dtype);

/// Cosines and sines of `position * inv_freq`, times `attention_factor`, for positions 0 to `length - 1`.
///
/// Angles are computed in float64 whatever the dtype of the result: a float32 angle is already wrong by 0.03 rad at
/// position 1,000,000, and a bfloat16 one beyond position 256.
///
/// This is the dispatcher operator `posenc::rotary_tables`. It is differentiable with respect to `inv_freq`, any number
/// of times; deterministic. On a GPU it is one launch. The last bit of an entry may differ between devices. For the
/// same bits on all devices, build the tables on the CPU and copy them.
///
/// @param inv_freq  float32 or float64 `[R/2]`.
/// @param length  number of rows, not negative.
/// @param dtype  float32 or float64; see `rotary_table_dtype`.
/// @param attention_factor  factor of both tables, positive and finite; see `RotaryFrequencies`. Default: 1.
/// @return `(cos, sin)`, each `[length, R/2]` on the device of `inv_freq`.
/// @throws c10::Error  naming the argument, what was expected and what came, before anything is launched.
///
/// Example:
/// ```
/// auto [cos, sin] = posenc::rotary_tables(posenc::rotary_inv_freq(128, 500000.0), 8192);
/// ```
POSENC_API std::tuple<at::Tensor, at::Tensor> rotary_tables(
    const at::Tensor& inv_freq,
    int64_t length,
    at::ScalarType dtype = at::kFloat,
    double attention_factor = 1.0);

}  // namespace posenc
