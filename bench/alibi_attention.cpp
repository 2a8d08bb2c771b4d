#include "cases.h"
#include "eager_alibi.h"

#include <posenc/alibi.h>
#include <posenc/alibi_attention.h>
#include <posenc/attention.h>

#ifdef POSENC_CUDNN
#include <cuda/detail/cudnn_graph.h>

#include <ATen/cuda/CUDAContext.h>
#endif

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <string_view>
#include <tuple>
#include <utility>

namespace posenc::bench {
namespace {

struct Configuration {
  at::ScalarType dtype;
  int64_t batch;
  int64_t sequence;
  int64_t heads;
  int64_t head_dim;
  bool causal;
  /// Slopes require a gradient.
  bool learnable;
};

std::string label(const Configuration& c) {
  std::ostringstream text;
  text << (c.dtype == at::kFloat ? "fp32" : "bf16") << "/B" << c.batch << "/S" << c.sequence
       << (c.causal ? "/causal" : "/symmetric") << (c.learnable ? "/learnable" : "/fixed");
  return text.str();
}

std::string title(const Configuration& c) {
  std::ostringstream text;
  text << (c.dtype == at::kFloat ? "fp32" : "bf16") << ", batch " << c.batch << ", sequence " << c.sequence << ", "
       << c.heads << " heads of " << c.head_dim << (c.causal ? ", causal" : ", symmetric")
       << (c.learnable ? ", learnable slopes" : ", fixed slopes");
  return text.str();
}

/// Sizes at which fused attention is usually compared. On a CPU, sizes that take seconds on a few cores.
std::vector<Configuration> configurations(c10::Device device) {
  std::vector<Configuration> all;
  for (const bool causal : {true, false}) {
    for (const bool learnable : {false, true}) {
      if (device.is_cpu()) {
        for (const int64_t sequence : {512, 2048}) {
          all.push_back({at::kFloat, 1, sequence, 4, 64, causal, learnable});
        }
        continue;
      }
      for (const auto& [batch, sequence] :
           std::vector<std::pair<int64_t, int64_t>>{{4, 1024}, {8, 2048}, {4, 4096}, {1, 16384}}) {
        all.push_back({at::kBFloat16, batch, sequence, 16, 128, causal, learnable});
        if (causal && !learnable) {
          all.push_back({at::kFloat, batch, sequence, 16, 128, causal, learnable});
        }
      }
    }
  }
  return all;
}

/// Floating point operations: two matrix products forward and five backward, over all scores or, with a causal mask,
/// over half of them.
double operations(const Configuration& c, Pass pass) {
  const double scores = static_cast<double>(c.batch * c.heads) * static_cast<double>(c.sequence) *
      static_cast<double>(c.sequence) * (c.causal ? 0.5 : 1.0);
  const double products = pass == Pass::forward ? 2 : pass == Pass::backward ? 5 : 7;
  return products * 2 * scores * static_cast<double>(c.head_dim);
}

/// The call under test, on q, k, v `[B, S, H, D]`.
using Call =
    std::function<at::Tensor(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& slopes)>;
using CallFactory = Call (*)(const Configuration&, const at::Tensor& slopes);

Call make_posenc(const Configuration& c, const at::Tensor& /*slopes*/) {
  return [options = ALiBiAttentionOptions().causal(c.causal)](
             const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& slopes) {
    return alibi_attention(q, k, v, slopes, options);
  };
}

/// Switches cuDNN off in its scope. posenc then runs as on other compute capabilities than 9.0.
class CudnnSwitch {
 public:
  explicit CudnnSwitch(bool on) : before_(at::globalContext().userEnabledCuDNN()) {
    at::globalContext().setUserEnabledCuDNN(on);
  }
  CudnnSwitch(const CudnnSwitch&) = delete;
  CudnnSwitch& operator=(const CudnnSwitch&) = delete;
  ~CudnnSwitch() { at::globalContext().setUserEnabledCuDNN(before_); }

 private:
  bool before_;
};

/// The same without slopes.
Call make_without_slopes(const Configuration& c, const at::Tensor& /*slopes*/) {
  return [options = AttentionOptions().causal(c.causal)](
             const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& /*slopes*/) {
    return attention(q, k, v, options);
  };
}

/// The bias `[1, H, S, S]`, -infinity where a causal mask hides the key.
at::Tensor bias_of(const Configuration& c, const at::Tensor& slopes) {
  return alibi_bias(slopes, c.sequence, c.sequence, c.causal, c.dtype).unsqueeze(0);
}

// With fixed slopes the bias, S * S elements per head, is made once and kept. With learnable slopes each call makes it.
Call make_stored_bias(const Configuration& c, const at::Tensor& slopes) {
  const at::Tensor kept = c.learnable ? at::Tensor() : bias_of(c, slopes);
  return [c, kept](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& now) {
    return library_attention(q, k, v, kept.defined() ? kept : bias_of(c, now), /*causal=*/false);
  };
}

// LibTorch's attention without a bias. It bounds the speed of attention with one.
Call make_without_bias(const Configuration& c, const at::Tensor& /*slopes*/) {
  return
      [causal = c.causal](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& /*slopes*/) {
        return library_attention(q, k, v, std::nullopt, causal);
      };
}

/// Random q, k and v of one configuration, the gradient of the result, and the published slopes.
struct Problem {
  Problem(const Configuration& c, c10::Device device)
      : slopes(alibi_slopes(c.heads).to(device).requires_grad_(c.learnable)) {
    const auto options = at::TensorOptions().dtype(c.dtype).device(device);
    for (at::Tensor* tensor : {&q, &k, &v, &gradient}) {
      *tensor = at::randn({c.batch, c.sequence, c.heads, c.head_dim}, options);
    }
    for (const at::Tensor& tensor : {q, k, v}) {
      tensor.requires_grad_();
    }
  }

  at::Tensor run(const Call& call) const { return call(q, k, v, slopes); }

  std::vector<at::Tensor> leaves() const {
    return slopes.requires_grad() ? std::vector<at::Tensor>{q, k, v, slopes} : std::vector<at::Tensor>{q, k, v};
  }

  void differentiate(const at::Tensor& output) const {
    torch::autograd::grad(
        {output}, leaves(), {gradient}, /*retain_graph=*/true, /*create_graph=*/false, /*allow_unused=*/true);
  }

  at::Tensor q, k, v, slopes, gradient;
};

Timing time_kernel(Device& device, const Problem& problem, const Call& call, Pass pass) {
  if (pass == Pass::forward) {
    return measure([&] { return device.time([&] { problem.run(call); }); });
  }
  const at::Tensor output = problem.run(call);
  return measure([&] { return device.time([&] { problem.differentiate(output); }); });
}

/// Includes memory that the call keeps between runs, such as a stored bias.
std::optional<int64_t> peak_memory(
    Device& device,
    const Configuration& c,
    const Problem& problem,
    CallFactory factory,
    Pass pass) {
  return device.peak_memory([&] {
    const Call call = factory(c, problem.slopes.detach());
    const at::Tensor output = problem.run(call);
    if (pass == Pass::backward) {
      problem.differentiate(output);
    }
  });
}

Timing time_wall(Device& device, const Problem& problem, const Call& call, Pass pass) {
  at::Tensor output;
  Step step;
  step.forward = [&] { output = problem.run(call); };
  step.backward = [&] { output.sum().backward(); };
  step.clear = [&] {
    output.reset();
    for (const at::Tensor& leaf : problem.leaves()) {
      leaf.mutable_grad().reset();
    }
  };
  return time_step(device, step, pass);
}

#ifdef POSENC_CUDNN

/// Whether posenc computes a configuration by cuDNN on a GPU that the tests have run on.
bool is_fused(const Configuration& c, c10::Device device) {
  return device.is_cuda() && c.dtype != at::kFloat && at::cuda::getDeviceProperties(device.index())->major == 9 &&
      cuda::why_no_cudnn_graphs().empty();
}

/// Times the cuDNN graph that posenc runs, without the operator around it.
Timing time_bare_cudnn(Device& device, const Configuration& c, Pass pass) {
  device.release_memory();
  const at::NoGradGuard no_grad;
  const Problem problem(c, device.torch_device());
  const cuda::CudnnGraph graph{
      problem.q,
      problem.k,
      problem.v,
      problem.slopes,
      /*key_limits=*/{},
      c.causal ? cuda::CudnnBias::ramp : cuda::CudnnBias::distance,
      c.causal ? cuda::CudnnMask::causal : cuda::CudnnMask::none,
      /*offset=*/0,
      /*scale=*/1 / std::sqrt(static_cast<double>(c.head_dim))};
  if (pass == Pass::forward) {
    return measure([&] { return device.time([&] { cuda::run_cudnn_forward(graph); }); });
  }
  const std::tuple<at::Tensor, at::Tensor> results = cuda::run_cudnn_forward(graph);
  return measure([&] {
    return device.time(
        [&] { cuda::run_cudnn_backward(graph, problem.gradient, std::get<0>(results), std::get<1>(results)); });
  });
}

#endif  // POSENC_CUDNN

}  // namespace

void add_alibi_attention(Suite& suite, Device& device, Protocol protocol) {
  const std::vector<std::pair<const char*, CallFactory>> common{
      {kPosenc, make_posenc}, {"stored_bias", make_stored_bias}, {kWithoutBias, make_without_bias}};
  const std::vector<Pass> passes = protocol == Protocol::kernel
      ? std::vector<Pass>{Pass::forward, Pass::backward}
      : std::vector<Pass>{Pass::forward, Pass::backward, Pass::total};
  for (const Configuration& c : configurations(device.torch_device())) {
    auto implementations = common;
    if (!device.torch_device().is_cpu() && protocol == Protocol::kernel && !c.learnable && c.dtype == at::kBFloat16) {
      implementations.emplace_back(kPosencWithoutCudnn, make_posenc);
      implementations.emplace_back(kPosencWithoutSlopes, make_without_slopes);
    }
    const auto add = [&](Pass pass, const char* name, const Suite::Body& body) {
      Case described{"ALiBi attention", label(c), title(c), pass, name, /*bytes=*/0};
      described.operations = operations(c, pass);
      suite.add(described, body);
    };
    for (const Pass pass : passes) {
      for (const auto& [name, factory] : implementations) {
        const bool with_cudnn = std::string_view(name) != kPosencWithoutCudnn;
        add(pass, name, [&device, protocol, c = c, pass, factory = factory, with_cudnn] {
          device.release_memory();
          const CudnnSwitch cudnn(with_cudnn);
          const Problem problem(c, device.torch_device());
          if (protocol == Protocol::wall) {
            return time_wall(device, problem, factory(c, problem.slopes.detach()), pass);
          }
          const std::optional<int64_t> peak = peak_memory(device, c, problem, factory, pass);
          Timing timing = time_kernel(device, problem, factory(c, problem.slopes.detach()), pass);
          timing.peak_bytes = peak;
          return timing;
        });
      }
#ifdef POSENC_CUDNN
      if (protocol == Protocol::kernel && !c.learnable && is_fused(c, device.torch_device())) {
        add(pass, kBareCudnn, [&device, c = c, pass] { return time_bare_cudnn(device, c, pass); });
      }
#endif
    }
  }
}

}  // namespace posenc::bench
