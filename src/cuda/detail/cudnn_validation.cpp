#include <blockwise/padded.h>
#include <cuda/detail/cudnn_validation.h>
#include <cuda/detail/rows_attention.h>
#include <posenc/detail/stream_capture.h>
#include <posenc/logging.h>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>

#include <array>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace posenc::cuda {
namespace {

using at::Tensor;

/// The pair of GPU architecture and cuDNN version that the tests of attention have run on.
constexpr int kTestedMajor = 9;
constexpr int kTestedMinor = 0;
constexpr size_t kTestedCudnn = 919;  // 9.19, of any patch level

/// Errors of right forms are 1 to 1.5 unit roundoffs of the dtype, relative to the norm of a result; those of the wrong
/// ones that were found are about 1, or NaN.
constexpr double kUnitRoundoffs = 8;

const char* to_string(CudnnBias bias) {
  return bias == CudnnBias::none ? "no bias" : bias == CudnnBias::ramp ? "a ramp" : "distances";
}

const char* to_string(CudnnMask mask) {
  return mask == CudnnMask::none ? "no mask" : mask == CudnnMask::causal ? "a causal mask" : "a causal mask at the end";
}

std::string to_string(const CudnnForm& form) {
  return c10::str(
      form.dtype, ", ", form.head_dim, " channels, ", to_string(form.bias), ", ", to_string(form.mask),
      form.offset ? ", an offset" : "", form.key_limits ? ", limits of keys" : "",
      form.grouped ? ", grouped heads" : "", form.deterministic ? ", deterministic" : "");
}

/// A problem of a form for cuDNN, and the same for `rows_attention` in float32.
struct Problem {
  CudnnGraph graph;
  blockwise::Padded wide;
  Tensor grad_out;
};

Problem problem_of(const CudnnForm& form) {
  constexpr int64_t kBatch = 2;
  constexpr int64_t kKeyHeads = 2;
  constexpr int64_t kTokens = 205;   // no multiple of a tile
  constexpr int64_t kMoreKeys = 77;  // before the queries
  constexpr int64_t kTiles = 256;    // keys of a graph of distances without limits: see cudnn_attention.cpp
  const bool whole_tiles = form.bias == CudnnBias::distance && !form.key_limits;
  const int64_t k_len = form.mask == CudnnMask::causal_bottom_right ? kTokens + kMoreKeys
      : whole_tiles                                                 ? kTiles
                                                                    : kTokens;
  const int64_t q_heads = form.grouped ? 2 * kKeyHeads : kKeyHeads;
  const auto device = at::device(at::kCUDA).dtype(form.dtype);
  // A generator of its own, so that random numbers of the caller stay the same.
  constexpr uint64_t kSeed = 2022;
  const at::Generator generator = at::detail::createCPUGenerator(kSeed);
  const auto random = [&](int64_t tokens, int64_t heads) {
    return at::randn({kBatch, tokens, heads, form.head_dim}, generator, at::dtype(at::kFloat)).to(device);
  };
  CudnnGraph graph{};
  graph.q = random(kTokens, q_heads);
  graph.k = random(k_len, kKeyHeads);
  graph.v = random(k_len, kKeyHeads);
  graph.bias = form.bias;
  graph.mask = form.mask;
  graph.scale = 1 / std::sqrt(static_cast<double>(form.head_dim));
  if (form.offset) {
    graph.offset = form.mask == CudnnMask::none ? k_len : k_len - kTokens;
  }
  const auto real = at::device(at::kCUDA).dtype(at::kFloat);
  if (form.bias != CudnnBias::none) {
    graph.slopes = at::arange(1, q_heads + 1, real).neg().exp2();
  }
  const Tensor grad_out = random(kTokens, q_heads);
  arguments::AttentionScores scores;
  scores.scale = graph.scale;
  scores.causal = form.mask != CudnnMask::none;
  scores.query_offset = scores.causal ? k_len - kTokens : graph.offset;
  blockwise::Padded wide(scores);
  wide.q = graph.q.to(at::kFloat);
  wide.k = graph.k.to(at::kFloat);
  wide.v = graph.v.to(at::kFloat);
  wide.slopes = graph.slopes;
  if (form.key_limits) {
    wide.seqlens_k = at::tensor({k_len, k_len / 2}, at::dtype(at::kLong)).to(at::kCUDA);
    graph.key_limits = wide.seqlens_k.to(at::kFloat);
    if (!form.limits_of_sequences) {
      graph.key_limits = graph.key_limits.unsqueeze(1).expand({kBatch, kTokens}).contiguous();
    }
  }
  return {graph, wide, grad_out};
}

/// The norm of the difference relative to the norm of `expected`.
double error_of(const Tensor& actual, const Tensor& expected) {
  const Tensor difference = actual.to(at::kDouble) - expected.to(at::kDouble);
  return (at::linalg_vector_norm(difference) / at::linalg_vector_norm(expected, 2, {}, false, at::kDouble))
      .item<double>();
}

/// The results of a form on a GPU architecture.
struct Verdict {
  std::once_flag once;
  std::string reason;
  std::atomic<bool> known{false};
};

using Key = std::tuple<int, int, at::ScalarType, int64_t, CudnnBias, CudnnMask, bool, bool, bool, bool>;

Verdict& verdict_of(const Key& key) {
  static std::mutex mutex;
  static auto* const verdicts = new std::map<Key, Verdict>;  // NOLINT(cppcoreguidelines-owning-memory): never destroyed
  const std::lock_guard<std::mutex> lock(mutex);
  return (*verdicts)[key];
}

bool is_forced() {
  static const bool forced = [] {
    const char* const value = std::getenv("POSENC_VALIDATE_CUDNN");  // NOLINT(concurrency-mt-unsafe): read once
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return forced;
}

}  // namespace

std::string why_wrong(const CudnnForm& form) {
  if (const std::string& reason = why_no_cudnn_graphs(); !reason.empty()) {
    return reason;
  }
  const auto [graph, wide, grad_out] = problem_of(form);
  const auto [expected_out, expected_lse] = rows_attention(wide);
  const auto [expected_dq, expected_dk, expected_dv, none] =
      rows_attention_backward(wide, grad_out.to(at::kFloat), {}, expected_out, expected_lse, /*slopes_grad=*/false);
  std::array<Tensor, 4> actual;
  try {
    const auto [out, lse] = run_cudnn_forward(graph);
    const auto [dq, dk, dv] = run_cudnn_backward(graph, grad_out, out, lse);
    actual = {out, dq, dk, dv};
  } catch (const c10::Error& error) {
    return c10::str("cuDNN refuses it: ", error.what_without_backtrace());
  }
  const std::array<Tensor, 4> expected{expected_out, expected_dq, expected_dk, expected_dv};
  constexpr std::array<const char*, 4> kNames{"the output", "dq", "dk", "dv"};
  const double unit_roundoff = form.dtype == at::kHalf ? std::ldexp(1, -11) : std::ldexp(1, -8);
  for (size_t i = 0; i < actual.size(); ++i) {
    const double error = error_of(actual[i], expected[i]);
    if (!(error <= kUnitRoundoffs * unit_roundoff)) {  // NaN too
      return c10::str(
          "the error of ", kNames[i], " is ", error, " of its norm, expected at most ", kUnitRoundoffs * unit_roundoff);
    }
  }
  return {};
}

std::string why_not_used(const CudnnForm& form) {
  const auto* const device = at::cuda::getCurrentDeviceProperties();
  const bool tested =
      device->major == kTestedMajor && device->minor == kTestedMinor && cudnn_version() / 100 == kTestedCudnn;
  if (tested && !is_forced()) {
    return {};
  }
  Verdict& verdict = verdict_of(
      {device->major, device->minor, form.dtype, form.head_dim, form.bias, form.mask, form.offset, form.key_limits,
       form.grouped, form.deterministic});
  if (!verdict.known && detail::is_capturing(at::Device(at::kCUDA, at::cuda::current_device()))) {
    return "cuDNN was not tried with this form before a CUDA graph was captured";
  }
  std::call_once(verdict.once, [&] {
    verdict.reason = why_wrong(form);
    log(LogLevel::info,
        c10::str(
            "alibi_attention: cuDNN ", cudnn_version(), " on compute capability ", device->major, ".", device->minor,
            ", ", to_string(form), ": ",
            verdict.reason.empty() ? "validated, used from now on" : "not used, " + verdict.reason));
    if (!verdict.reason.empty()) {
      verdict.reason = "cuDNN's results were not right: " + verdict.reason;
    }
    verdict.known = true;
  });
  return verdict.reason;
}

}  // namespace posenc::cuda
