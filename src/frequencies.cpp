#include <posenc/frequencies.h>

#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/pow.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <sstream>

namespace posenc {

using at::Tensor;

namespace {

constexpr double kPi = 3.14159265358979323846;
constexpr const char* kDynamicNtk = "dynamic NTK";

void check_positive(const char* plan, const char* field, double value) {
  TORCH_CHECK(
      value > 0 && std::isfinite(value), "posenc::rotary_frequencies: ", plan, ": expected a positive, finite ", field,
      ", got ", value);
}

void check_length(const char* plan, const char* field, int64_t value) {
  TORCH_CHECK(value > 0, "posenc::rotary_frequencies: ", plan, ": expected a positive ", field, ", got ", value);
}

void check_seq_len(const char* plan, int64_t seq_len) {
  TORCH_CHECK(
      seq_len >= 0, "posenc::rotary_frequencies: ", plan, ": expected a seq_len that is not negative, got ", seq_len);
}

/// The base for which the first frequency is unchanged and the last one is divided by `stretch`.
double ntk_base(const char* plan, int64_t rotary_dim, double base, double stretch) {
  TORCH_CHECK(
      rotary_dim > 2, "posenc::rotary_frequencies: ", plan, ": expected a rotary_dim of at least 4, got ", rotary_dim);
  const auto dim = static_cast<double>(rotary_dim);
  return base * std::pow(stretch, dim / (dim - 2));
}

/// The results of `map(i, w)` for each frequency w.
Tensor mapped(const Tensor& inv_freq, const std::function<double(int64_t, double)>& map) {
  Tensor result = at::empty_like(inv_freq);
  const double* from = inv_freq.const_data_ptr<double>();
  double* to = result.mutable_data_ptr<double>();
  for (int64_t i = 0; i < inv_freq.numel(); ++i) {
    to[i] = map(i, from[i]);
  }
  return result;
}

/// Whether LongRoPE uses the long factors for a sequence of `seq_len` positions.
bool is_long(const LongRopeScaling& scaling, int64_t seq_len) {
  return seq_len > scaling.original_max_position_embeddings;
}

/// The length n whose frequencies dynamic NTK uses for a sequence of `seq_len` positions. Checks all lengths.
int64_t dynamic_ntk_length(const DynamicNtkScaling& scaling, int64_t seq_len) {
  const int64_t multiple = scaling.seq_len_multiple;
  check_length(kDynamicNtk, "max_position_embeddings", scaling.max_position_embeddings);
  check_length(kDynamicNtk, "seq_len_multiple", multiple);
  check_seq_len(kDynamicNtk, seq_len);
  if (seq_len <= scaling.max_position_embeddings) {
    return scaling.max_position_embeddings;
  }
  const int64_t added = (multiple - seq_len % multiple) % multiple;
  TORCH_CHECK(
      seq_len <= std::numeric_limits<int64_t>::max() - added, "posenc::rotary_frequencies: ", kDynamicNtk,
      ": expected a seq_len that can be rounded up to a multiple of seq_len_multiple = ", multiple, " below 2^63, got ",
      seq_len);
  return seq_len + added;
}

}  // namespace

Tensor rotary_inv_freq(int64_t rotary_dim, double base) {
  TORCH_CHECK(
      rotary_dim > 0 && rotary_dim % 2 == 0, "posenc::rotary_inv_freq: expected a positive, even rotary_dim, got ",
      rotary_dim);
  TORCH_CHECK(base > 0 && std::isfinite(base), "posenc::rotary_inv_freq: expected a positive, finite base, got ", base);
  const Tensor i = at::arange(rotary_dim / 2, at::TensorOptions().dtype(at::kDouble));
  return at::pow(base, i.mul(-2.0).div(rotary_dim));
}

// --- Plans ----------------------------------------------------------------------------------------------------

RotaryFrequencies rotary_frequencies(int64_t rotary_dim, double base, const DefaultScaling& /*scaling*/) {
  return {rotary_inv_freq(rotary_dim, base)};
}

RotaryFrequencies rotary_frequencies(int64_t rotary_dim, double base, const LinearScaling& scaling) {
  check_positive("linear", "factor", scaling.factor);
  return {rotary_inv_freq(rotary_dim, base).div(scaling.factor)};
}

RotaryFrequencies rotary_frequencies(
    int64_t rotary_dim,
    double base,
    const DynamicNtkScaling& scaling,
    int64_t seq_len) {
  check_positive(kDynamicNtk, "factor", scaling.factor);
  const double times =
      static_cast<double>(dynamic_ntk_length(scaling, seq_len)) / static_cast<double>(scaling.max_position_embeddings);
  const double stretch = scaling.factor * times - (scaling.factor - 1);
  return {rotary_inv_freq(rotary_dim, ntk_base(kDynamicNtk, rotary_dim, base, stretch))};
}

RotaryFrequencies rotary_frequencies(int64_t rotary_dim, double base, const StaticNtkScaling& scaling) {
  check_positive("static NTK", "factor", scaling.factor);
  return {rotary_inv_freq(rotary_dim, ntk_base("static NTK", rotary_dim, base, scaling.factor))};
}

RotaryFrequencies rotary_frequencies(int64_t rotary_dim, double base, const YarnScaling& scaling) {
  constexpr const char* kPlan = "YaRN";
  const double s = scaling.factor;
  check_positive(kPlan, "factor", s);
  check_length(kPlan, "original_max_position_embeddings", scaling.original_max_position_embeddings);
  check_positive(kPlan, "beta_slow", scaling.beta_slow);
  TORCH_CHECK(
      scaling.beta_fast >= scaling.beta_slow && std::isfinite(scaling.beta_fast),
      "posenc::rotary_frequencies: YaRN: expected a finite beta_fast of at least beta_slow = ", scaling.beta_slow,
      ", got ", scaling.beta_fast);
  TORCH_CHECK(base > 1, "posenc::rotary_frequencies: YaRN: expected a base above 1, got ", base);
  const Tensor inv_freq = rotary_inv_freq(rotary_dim, base);
  const auto dim = static_cast<double>(rotary_dim);

  const auto pair_that_turns = [&](double times) {
    const auto positions = static_cast<double>(scaling.original_max_position_embeddings);
    return dim * std::log(positions / (2 * kPi * times)) / (2 * std::log(base));
  };
  double lo = pair_that_turns(scaling.beta_fast);
  double hi = pair_that_turns(scaling.beta_slow);
  if (scaling.truncate) {
    lo = std::floor(lo);
    hi = std::ceil(hi);
  }
  lo = std::max(lo, 0.0);
  hi = std::min(hi, dim - 1);
  if (lo == hi) {
    hi += 0.001;
  }

  const auto m = [s](double k) { return s <= 1 ? 1.0 : 0.1 * k * std::log(s) + 1.0; };
  const auto given_or_zero = [](const char* field, const std::optional<double>& given) {
    const double value = given.value_or(0);
    TORCH_CHECK(
        value >= 0 && std::isfinite(value), "posenc::rotary_frequencies: YaRN: expected a finite ", field,
        " that is not negative, got ", value);
    return value;
  };
  const double mscale = given_or_zero("mscale", scaling.mscale);
  const double mscale_all_dim = given_or_zero("mscale_all_dim", scaling.mscale_all_dim);
  const double derived = mscale != 0 && mscale_all_dim != 0 ? m(mscale) / m(mscale_all_dim) : m(1);
  const double attention_factor = scaling.attention_factor.value_or(derived);
  check_positive(kPlan, "attention_factor", attention_factor);

  const auto blend = [=](int64_t i, double w) {
    const double g = std::clamp((static_cast<double>(i) - lo) / (hi - lo), 0.0, 1.0);
    return g * w / s + (1 - g) * w;
  };
  return {mapped(inv_freq, blend), attention_factor};
}

RotaryFrequencies rotary_frequencies(int64_t rotary_dim, double base, const Llama3Scaling& scaling) {
  constexpr const char* kPlan = "Llama 3";
  const double s = scaling.factor;
  const double low = scaling.low_freq_factor;
  const double high = scaling.high_freq_factor;
  check_positive(kPlan, "factor", s);
  check_positive(kPlan, "low_freq_factor", low);
  check_length(kPlan, "original_max_position_embeddings", scaling.original_max_position_embeddings);
  TORCH_CHECK(
      high >= low && std::isfinite(high),
      "posenc::rotary_frequencies: Llama 3: expected a finite high_freq_factor of at least low_freq_factor = ", low,
      ", got ", high);
  const auto positions = static_cast<double>(scaling.original_max_position_embeddings);
  return {mapped(rotary_inv_freq(rotary_dim, base), [=](int64_t /*i*/, double w) {
    const double wavelength = 2 * kPi / w;
    if (wavelength > positions / low) {
      return w / s;
    }
    // Also avoids 0/0 in the quotient below if both factors are equal, as in Llama 4.
    if (wavelength <= positions / high) {
      return w;
    }
    const double t = (positions / wavelength - low) / (high - low);
    return (1 - t) * w / s + t * w;
  })};
}

RotaryFrequencies rotary_frequencies(int64_t rotary_dim, double base, const LongRopeScaling& scaling, int64_t seq_len) {
  constexpr const char* kPlan = "LongRoPE";
  check_length(kPlan, "original_max_position_embeddings", scaling.original_max_position_embeddings);
  check_seq_len(kPlan, seq_len);
  const Tensor inv_freq = rotary_inv_freq(rotary_dim, base);
  // Checks both factors, although only one is used, so that an error is reported before the first long sequence.
  const auto check_factors = [&](const char* field, const std::vector<double>& factors) {
    TORCH_CHECK(
        static_cast<int64_t>(factors.size()) == rotary_dim / 2, "posenc::rotary_frequencies: LongRoPE: expected ",
        rotary_dim / 2, " numbers (rotary_dim / 2) in ", field, ", got ", factors.size());
    for (const double factor : factors) {
      check_positive(kPlan, field, factor);
    }
  };
  check_factors("short_factor", scaling.short_factor);
  check_factors("long_factor", scaling.long_factor);

  const auto positions = static_cast<double>(scaling.original_max_position_embeddings);
  const auto derived = [&] {
    TORCH_CHECK(
        scaling.factor || scaling.max_position_embeddings,
        "posenc::rotary_frequencies: LongRoPE: expected factor, max_position_embeddings or both attention factors, got "
        "none of them");
    if (scaling.max_position_embeddings) {
      check_length(kPlan, "max_position_embeddings", *scaling.max_position_embeddings);
    }
    const double s =
        scaling.factor ? *scaling.factor : static_cast<double>(*scaling.max_position_embeddings) / positions;
    check_positive(kPlan, "factor", s);
    return s <= 1 ? 1.0 : std::sqrt(1 + std::log(s) / std::log(positions));
  };
  const auto attention_factor = [&](const char* field, const std::optional<double>& given) {
    const double value = given ? *given : derived();
    check_positive(kPlan, field, value);
    return value;
  };
  const double of_short = attention_factor("short_attention_factor", scaling.short_attention_factor);
  const double of_long = attention_factor("long_attention_factor", scaling.long_attention_factor);

  const bool take_long = is_long(scaling, seq_len);
  const std::vector<double>& factors = take_long ? scaling.long_factor : scaling.short_factor;
  const auto divide = [&factors](int64_t i, double w) { return w / factors[static_cast<size_t>(i)]; };
  return {mapped(inv_freq, divide), take_long ? of_long : of_short};
}

RotaryFrequencies rotary_frequencies(int64_t rotary_dim, double base, const ProportionalScaling& scaling) {
  check_positive("proportional", "factor", scaling.factor);
  const double p = scaling.partial_rotary_factor;
  TORCH_CHECK(
      p >= 0 && p <= 1, "posenc::rotary_frequencies: proportional: expected a partial_rotary_factor of 0 to 1, got ",
      p);
  const auto rotated = static_cast<int64_t>(std::floor(p * static_cast<double>(rotary_dim) / 2));
  return {mapped(rotary_inv_freq(rotary_dim, base), [&scaling, rotated](int64_t i, double w) {
    return i < rotated ? w / scaling.factor : 0.0;
  })};
}

namespace {

/// `rotary_frequencies` of one plan; `seq_len` is passed to plans that depend on it.
template <typename Scaling>
RotaryFrequencies frequencies_of(int64_t rotary_dim, double base, const Scaling& scaling, int64_t seq_len) {
  constexpr bool kTakesLength = std::is_same_v<Scaling, DynamicNtkScaling> || std::is_same_v<Scaling, LongRopeScaling>;
  if constexpr (kTakesLength) {
    return rotary_frequencies(rotary_dim, base, scaling, seq_len);
  } else {
    return rotary_frequencies(rotary_dim, base, scaling);
  }
}

/// Writes `name(field=value, field=value)` without the options that are not set.
class Printer {
 public:
  explicit Printer(const char* name) { stream_ << name; }

  template <typename T>
  Printer& field(const char* name, const T& value) {
    stream_ << (first_ ? "(" : ", ") << name << '=' << std::boolalpha << value;
    first_ = false;
    return *this;
  }

  template <typename T>
  Printer& field(const char* name, const std::optional<T>& value) {
    return value ? field(name, *value) : *this;
  }

  std::string text() const { return stream_.str() + (first_ ? "" : ")"); }

 private:
  std::ostringstream stream_;
  bool first_ = true;
};

std::string text_of(const DefaultScaling& /*scaling*/) {
  return "default";
}

std::string text_of(const LinearScaling& scaling) {
  return Printer("linear").field("factor", scaling.factor).text();
}

std::string text_of(const DynamicNtkScaling& scaling) {
  return Printer("dynamic")
      .field("factor", scaling.factor)
      .field("max_position_embeddings", scaling.max_position_embeddings)
      .field("seq_len_multiple", scaling.seq_len_multiple)
      .text();
}

std::string text_of(const StaticNtkScaling& scaling) {
  return Printer("ntk").field("factor", scaling.factor).text();
}

std::string text_of(const YarnScaling& scaling) {
  return Printer("yarn")
      .field("factor", scaling.factor)
      .field("original_max_position_embeddings", scaling.original_max_position_embeddings)
      .field("beta_fast", scaling.beta_fast)
      .field("beta_slow", scaling.beta_slow)
      .field("truncate", scaling.truncate)
      .field("attention_factor", scaling.attention_factor)
      .field("mscale", scaling.mscale)
      .field("mscale_all_dim", scaling.mscale_all_dim)
      .text();
}

std::string text_of(const Llama3Scaling& scaling) {
  return Printer("llama3")
      .field("factor", scaling.factor)
      .field("low_freq_factor", scaling.low_freq_factor)
      .field("high_freq_factor", scaling.high_freq_factor)
      .field("original_max_position_embeddings", scaling.original_max_position_embeddings)
      .text();
}

std::string text_of(const LongRopeScaling& scaling) {
  return Printer("longrope")
      .field("original_max_position_embeddings", scaling.original_max_position_embeddings)
      .field("factor", scaling.factor)
      .field("max_position_embeddings", scaling.max_position_embeddings)
      .field("short_attention_factor", scaling.short_attention_factor)
      .field("long_attention_factor", scaling.long_attention_factor)
      .text();
}

std::string text_of(const ProportionalScaling& scaling) {
  return Printer("proportional")
      .field("partial_rotary_factor", scaling.partial_rotary_factor)
      .field("factor", scaling.factor)
      .text();
}

}  // namespace

RotaryFrequencies rotary_frequencies(int64_t rotary_dim, double base, const RotaryScaling& scaling, int64_t seq_len) {
  return std::visit([&](const auto& plan) { return frequencies_of(rotary_dim, base, plan, seq_len); }, scaling);
}

int64_t rotary_frequency_length(const RotaryScaling& scaling, int64_t seq_len) {
  if (const auto* dynamic = std::get_if<DynamicNtkScaling>(&scaling)) {
    return dynamic_ntk_length(*dynamic, seq_len);
  }
  if (const auto* long_rope = std::get_if<LongRopeScaling>(&scaling)) {
    return long_rope->original_max_position_embeddings + (is_long(*long_rope, seq_len) ? 1 : 0);
  }
  return 0;
}

bool depends_on_length(const RotaryScaling& scaling) {
  return std::holds_alternative<DynamicNtkScaling>(scaling) || std::holds_alternative<LongRopeScaling>(scaling);
}

std::string to_string(const RotaryScaling& scaling) {
  return std::visit([](const auto& plan) { return text_of(plan); }, scaling);
}

Tensor rotary_xpos_scales(int64_t rotary_dim, int64_t length, double scale_base) {
  TORCH_CHECK(
      rotary_dim > 0 && rotary_dim % 2 == 0, "posenc::rotary_xpos_scales: expected a positive, even rotary_dim, got ",
      rotary_dim);
  TORCH_CHECK(length >= 0, "posenc::rotary_xpos_scales: expected a length that is not negative, got ", length);
  TORCH_CHECK(
      scale_base > 0 && std::isfinite(scale_base),
      "posenc::rotary_xpos_scales: expected a positive, finite scale_base, got ", scale_base);
  const auto float64 = at::TensorOptions().dtype(at::kDouble);
  const auto dim = static_cast<double>(rotary_dim);
  const Tensor z = at::arange(rotary_dim / 2, float64).mul(2.0).add(0.4 * dim).div(1.4 * dim);
  const int64_t middle = length / 2;
  const Tensor exponent = at::arange(length, float64).sub(static_cast<double>(middle)).div(scale_base);
  return at::pow(z, exponent.unsqueeze(-1));
}

// --- Tables ---------------------------------------------------------------------------------------------------

at::ScalarType rotary_table_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace posenc
