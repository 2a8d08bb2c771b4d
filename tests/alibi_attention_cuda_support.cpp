#include "alibi_attention_cuda_support.h"

#include <posenc/logging.h>
#include <posenc/reference.h>

#include <ATen/ATen.h>

#include <cmath>

namespace posenc::test {
namespace {

constexpr size_t kFirstGradientOfScores = 2;
constexpr size_t kGradientOfValues = 4;

/// The results of a call and the gradients of its inputs.
TensorList with_gradients(
    const std::tuple<at::Tensor, at::Tensor>& results,
    const AttentionInputs& in,
    const at::Tensor& grad) {
  const auto& [out, lse] = results;
  TensorList inputs{in.q, in.k, in.v};
  if (in.slopes.defined()) {
    inputs.push_back(in.slopes);
  }
  TensorList all = gradients({out}, inputs, {grad});
  all.insert(all.begin(), {out, lse});
  return all;
}

}  // namespace

std::string logged(const std::function<void()>& action) {
  const LogLevel before = log_level();
  set_log_level(LogLevel::debug);
  ::testing::internal::CaptureStderr();
  action();
  std::string text = ::testing::internal::GetCapturedStderr();
  set_log_level(before);
  return text;
}

TensorList everything(const AttentionInputs& inputs, const at::Tensor& grad) {
  const AttentionInputs in = attention_leaves(inputs);
  return with_gradients(attend_with_lse(in), in, grad);
}

TensorList everything_in_float64(const AttentionInputs& inputs, const at::Tensor& grad) {
  const AttentionInputs wide = attention_leaves(in_float64(inputs));
  return with_gradients(reference_attention(wide), wide, grad.to(at::kDouble));
}

double tolerance(size_t result, at::ScalarType dtype) {
  const double u = unit_roundoff(dtype);
  constexpr double kOfLse = 1e-5;
  constexpr double kOfSlopes = 0.01;
  const double all[] = {u, kOfLse, 2 * u, 2 * u, 2 * u, kOfSlopes};
  return all[result];
}

void expect_everything_right(
    const AttentionCase& c,
    const AttentionInputs& in,
    const at::Tensor& grad,
    const TensorList& actual) {
  const at::ScalarType dtype = in.q.scalar_type();
  const TensorList expected = everything_in_float64(in, grad);
  for (size_t i = 0; i < actual.size(); ++i) {
    SCOPED_TRACE(kNames[i]);
    const at::Tensor infinite = expected[i].isinf();
    EXPECT_TRUE(actual[i].isinf().eq(infinite).all().item<bool>());
    const at::Tensor result = actual[i].masked_fill(infinite, 0);
    if ((c.k_len == 1 || c.window_left == 0) && i >= kFirstGradientOfScores && i != kGradientOfValues) {
      // The probability of a single visible key is always 1, so these gradients are zero except for the rounding of
      // `out`.
      EXPECT_LE(result.norm().item<double>(), 2 * unit_roundoff(dtype) * (grad.norm() * in.v.norm()).item<double>());
      continue;
    }
    // With few visible keys or one query, the terms of the gradients of scores mostly cancel.
    const bool few_keys = c.k_len <= 8 || c.window_left.value_or(c.k_len) <= 1;
    const double factor = few_keys || c.q_len == 1 ? 2 : 1;
    EXPECT_LE(relative_error(result, expected[i].masked_fill(infinite, 0)), factor * tolerance(i, dtype));
  }
}

std::vector<AttentionCase> attention_forms() {
  std::vector<AttentionCase> cases;
  const auto add = [&cases](const std::string& name, const AttentionCase& base, const auto& change) {
    AttentionCase c = base;
    c.name = name + "S" + std::to_string(base.q_len) + "D" + std::to_string(base.head_dim);
    change(c);
    cases.push_back(c);
  };
  const auto add_all_lengths = [&](const AttentionCase& base) {
    add("Causal", base, [](AttentionCase& c) { c.causal = true; });
    add("CausalAtTheEnd", base, [](AttentionCase& c) { c.causal = true, c.q_len = c.k_len / 2; });
    add("Symmetric", base, [](AttentionCase&) {});
  };
  const auto of = [](int64_t length, int64_t head_dim) {
    AttentionCase c;
    c.q_len = c.k_len = length;
    c.head_dim = head_dim;
    c.largest_slope = 0.5;
    return c;
  };
  for (const int64_t length : {257, 448, 2048}) {
    for (const int64_t head_dim : {64, 96, 128, 256}) {
      add_all_lengths(of(length, head_dim));
    }
  }
  for (const int64_t head_dim : {32, 80, 192}) {
    add_all_lengths(of(257, head_dim));
  }
  // Fewer keys than a tile of the fused kernels.
  for (const int64_t keys : {2, 3, 7, 8, 16, 31, 64, 100, 127, 128, 129, 255, 256}) {
    const AttentionCase base = of(keys, keys % 2 == 0 ? 64 : 128);
    add("CausalFewKeys", base, [](AttentionCase& c) { c.causal = true; });
    add("SymmetricFewKeys", base, [](AttentionCase&) {});
    add("CausalOneQueryFewKeys", base, [](AttentionCase& c) { c.causal = true, c.q_len = 1; });
    add("ManyQueriesFewKeys", base, [](AttentionCase& c) { c.q_len = 300, c.query_offset = 0; });
  }
  for (const int64_t queries : {2, 64, 300}) {
    add("OneKey", of(queries, 128), [](AttentionCase& c) { c.k_len = 1; });
    add("OneKeyBehind", of(queries, 64), [](AttentionCase& c) { c.k_len = 1, c.query_offset = 0; });
  }
  for (const int64_t length : {257, 448, 512}) {
    const AttentionCase base = of(length, 128);
    for (const int64_t count : {1, 2, 17}) {
      add("CausalLast" + std::to_string(count) + "Of", base, [=](AttentionCase& c) {
        c.causal = true;
        c.q_len = count;
      });
      add("SymmetricLast" + std::to_string(count) + "Of", base, [=](AttentionCase& c) { c.q_len = count; });
    }
    for (const int64_t offset : {-100, 0, 100, 3000}) {
      add("SymmetricOffset" + std::string(offset < 0 ? "Minus" : "") + std::to_string(std::abs(offset)) + "Of", base,
          [=](AttentionCase& c) { c.query_offset = offset; });
    }
    add("CausalBehindAllKeys", base, [](AttentionCase& c) { c.causal = true, c.query_offset = c.k_len + 5; });
    for (const bool causal : {false, true}) {
      const std::string suffix = causal ? "Causal" : "";
      // seqlens_q and seqlens_k, with one query_offset for all sequences.
      add("Padded" + suffix, base, [=](AttentionCase& c) {
        c.causal = causal;
        c.batch = 3;
        c.query_offset = 0;
        c.seqlens_q = c.seqlens_k = {c.k_len, 0, 130};
      });
      add("PaddedKeys" + suffix, base, [=](AttentionCase& c) {
        c.causal = causal;
        c.batch = 3;
        c.query_offset = 0;
        c.seqlens_k = {c.k_len, 0, 130};
      });
      add("PaddedAtTheEnd" + suffix, base, [=](AttentionCase& c) {
        c.causal = causal;
        c.q_len = 96;
        c.query_offset = c.k_len - c.q_len;
        c.seqlens_k = {c.k_len, 200};
        c.seqlens_q = {50, 96};
      });
      add("Packed" + suffix, base, [=](AttentionCase& c) {
        c.causal = causal;
        c.cu_seqlens_q = {0, c.q_len / 2, c.q_len};
      });
      // Sequences of such different lengths are computed in several padded batches.
      add("PackedOfManyLengths" + suffix, base, [=](AttentionCase& c) {
        c.causal = causal;
        c.cu_seqlens_q = {0, 1, 3, 6, 6, 6, 16, 27, 130, 130, c.q_len};
      });
    }
    for (const bool causal : {false, true}) {
      add(causal ? "HeadMajorCausal" : "HeadMajor", base, [=](AttentionCase& c) {
        c.causal = causal;
        c.strides = Strides::head_major;
      });
      add(causal ? "OneKeyHeadCausal" : "OneKeyHead", base, [=](AttentionCase& c) {
        c.causal = causal;
        c.q_heads = 8;
        c.k_heads = 1;
      });
      add(causal ? "HeadSliceCausal" : "HeadSlice", base, [=](AttentionCase& c) {
        c.causal = causal;
        c.strides = Strides::head_slice;
        c.every_other_slope = true;
      });
    }
  }
  for (const int64_t length : {257, 512}) {
    const AttentionCase base = of(length, 128);
    for (const bool causal : {false, true}) {
      const std::string suffix = causal ? "Causal" : "";
      add("WithoutSlopes" + suffix, base, [=](AttentionCase& c) { c.causal = causal, c.with_slopes = false; });
      add("WithoutSlopesAtTheEnd" + suffix, base, [=](AttentionCase& c) {
        c.causal = causal;
        c.with_slopes = false;
        c.q_len = c.k_len / 2;
      });
      add("WithoutSlopesPadded" + suffix, base, [=](AttentionCase& c) {
        c.causal = causal;
        c.with_slopes = false;
        c.batch = 3;
        c.seqlens_q = c.seqlens_k = {c.k_len, 0, 130};
      });
      add("SlopesOfSequences" + suffix, base, [=](AttentionCase& c) {
        c.causal = causal;
        c.batch = 3;
        c.slopes_of_sequences = true;
      });
      add("PackedSlopesOfSequences" + suffix, base, [=](AttentionCase& c) {
        c.causal = causal;
        c.slopes_of_sequences = true;
        c.cu_seqlens_q = {0, 1, 3, 6, 6, 6, 16, 27, 130, 130, c.q_len};
      });
      for (const bool with_slopes : {false, true}) {
        add(std::string("Softcap") + (with_slopes ? "AndSlopes" : "") + suffix, base, [=](AttentionCase& c) {
          c.causal = causal;
          c.with_slopes = with_slopes;
          c.softcap = 1.5;
        });
      }
      for (const int64_t window : {0, 1, 127, 128, 129, 1000}) {
        add("Window" + std::to_string(window) + "Of" + suffix, base, [=](AttentionCase& c) {
          c.causal = causal;
          c.window_left = window;
          c.window_right = window / 2;
          c.with_slopes = window % 2 == 0;
        });
      }
      add("WindowPacked" + suffix, base, [=](AttentionCase& c) {
        c.causal = causal;
        c.window_left = 20;
        c.cu_seqlens_q = {0, 1, 3, 6, 6, 6, 16, 27, 130, 130, c.q_len};
      });
    }
  }
  return cases;
}

std::string attention_form_name(const ::testing::TestParamInfo<std::tuple<at::ScalarType, AttentionCase>>& info) {
  return std::get<1>(info.param).name + "_" + at::toString(std::get<0>(info.param));
}

}  // namespace posenc::test
