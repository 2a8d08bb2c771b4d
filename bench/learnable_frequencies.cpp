#include "cases.h"
#include "eager_rotary_embedding.h"

#include <posenc/frequencies.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// RoPE whose inv_freq is a parameter: every forward pass makes the tables from it, and every backward pass computes the
// gradients of inv_freq, q and k.
namespace posenc::bench {
namespace {

constexpr int64_t kHeadDim = 128;

struct Configuration {
  at::ScalarType dtype;
  int64_t sequence;
  int64_t heads;
};

std::string label(const Configuration& c) {
  std::ostringstream text;
  text << (c.dtype == at::kHalf           ? "fp16"
               : c.dtype == at::kBFloat16 ? "bf16"
                                          : "fp32")
       << "/B1/S" << c.sequence << "/H" << c.heads;
  return text.str();
}

std::string title(const Configuration& c) {
  std::ostringstream text;
  text << (c.dtype == at::kHalf           ? "fp16"
               : c.dtype == at::kBFloat16 ? "bf16"
                                          : "fp32")
       << ", batch 1, sequence " << c.sequence << ", " << c.heads << " heads of " << kHeadDim;
  return text.str();
}

/// Bytes of q and k together.
int64_t tensor_bytes(const Configuration& c) {
  return 2 * c.sequence * c.heads * kHeadDim * static_cast<int64_t>(at::elementSize(c.dtype));
}

/// Minimum bytes of a pass. Forward reads and writes q and k. Backward reads q, k and gradients, and writes gradients.
int64_t minimum_traffic(const Configuration& c, Pass pass) {
  return pass == Pass::forward ? 2 * tensor_bytes(c) : 3 * tensor_bytes(c);
}

using Pair = std::tuple<at::Tensor, at::Tensor>;
using Call = std::function<Pair(const at::Tensor& q, const at::Tensor& k, const at::Tensor& inv_freq)>;

Pair call_posenc(const at::Tensor& q, const at::Tensor& k, const at::Tensor& inv_freq) {
  const auto [cos, sin] = rotary_tables(inv_freq, q.size(1), rotary_table_dtype(q.scalar_type()));
  return rotary_embedding_qk(q, k, cos, sin);
}

/// Makes float32 tables as models do, then rotates by one of the usual formulations.
Call make_eager(const EagerFormulation& formulation) {
  return [formulation](const at::Tensor& q, const at::Tensor& k, const at::Tensor& inv_freq) -> Pair {
    const at::Tensor angles = at::outer(at::arange(q.size(1), inv_freq.options()), inv_freq);
    const auto rotate = formulation.make({angles.cos(), angles.sin(), q.scalar_type(), /*sequence_dim=*/1});
    return {rotate(q), rotate(k)};
  };
}

std::vector<std::pair<std::string, Call>> implementations() {
  std::vector<std::pair<std::string, Call>> all{{kPosenc, call_posenc}};
  for (const auto& formulation : eager_rotary_embeddings(/*interleaved=*/false)) {
    all.emplace_back(formulation.name, make_eager(formulation));
  }
  return all;
}

struct Problem {
  Problem(const Configuration& c, c10::Device device)
      : inv_freq(rotary_inv_freq(kHeadDim).to(device, at::kFloat).requires_grad_()) {
    const auto options = at::TensorOptions().dtype(c.dtype).device(device);
    q = at::randn({1, c.sequence, c.heads, kHeadDim}, options).requires_grad_();
    k = at::randn({1, c.sequence, c.heads, kHeadDim}, options).requires_grad_();
  }

  std::vector<at::Tensor> leaves() const { return {q, k, inv_freq}; }

  at::Tensor inv_freq, q, k;
};

Timing time_kernels(Device& device, const Problem& problem, const Call& call, Pass pass) {
  if (pass == Pass::forward) {
    return measure([&] { return device.time([&] { call(problem.q, problem.k, problem.inv_freq); }); });
  }
  const auto [q, k] = call(problem.q, problem.k, problem.inv_freq);
  const std::vector<at::Tensor> outputs{q, k};
  const std::vector<at::Tensor> gradients{at::randn_like(q), at::randn_like(k)};
  return measure([&] {
    return device.time([&] { torch::autograd::grad(outputs, problem.leaves(), gradients, /*retain_graph=*/true); });
  });
}

Timing time_training_step(Device& device, const Problem& problem, const Call& call, Pass pass) {
  Pair rotated;
  Step step;
  step.forward = [&] { rotated = call(problem.q, problem.k, problem.inv_freq); };
  step.backward = [&] { (std::get<0>(rotated).sum() + std::get<1>(rotated).sum()).backward(); };
  step.clear = [&] {
    rotated = {};
    for (const at::Tensor& leaf : problem.leaves()) {
      leaf.mutable_grad().reset();
    }
  };
  return time_step(device, step, pass);
}

}  // namespace

void add_learnable_frequencies(Suite& suite, Device& device, Protocol protocol) {
  // One size for narrow dtypes, whose q and k (134 MB each) fit no cache. On a CPU, a size that a few cores can handle.
  const std::vector<Configuration> configurations = device.torch_device().is_cuda()
      ? std::vector<Configuration>{{at::kHalf, 8192, 64}, {at::kBFloat16, 8192, 64}}
      : std::vector<Configuration>{{at::kFloat, 1024, 16}};
  const bool kernels = protocol == Protocol::kernel;
  for (const Configuration& c : configurations) {
    for (const Pass pass : {Pass::forward, Pass::backward, Pass::total}) {
      if (kernels && pass == Pass::total) {
        continue;
      }
      const auto describe = [&](const std::string& implementation) {
        // No rate in bytes for a whole step: wall time includes the host and two sums.
        return Case{"RoPE learnable", label(c), title(c), pass, implementation, kernels ? minimum_traffic(c, pass) : 0};
      };
      if (kernels) {
        suite.add(describe(kCopy), [&device, bytes = minimum_traffic(c, pass) / 2] {
          device.release_memory();
          const Work copy = device.make_copy(bytes);
          return measure([&] { return device.time(copy); });
        });
      }
      for (const auto& [name, call] : implementations()) {
        suite.add(describe(name), [&device, c, pass, kernels, call = call] {
          device.release_memory();
          const Problem problem(c, device.torch_device());
          return kernels ? time_kernels(device, problem, call, pass) : time_training_step(device, problem, call, pass);
        });
      }
    }
  }
}

}  // namespace posenc::bench
