#include "cases.h"
#include "eager_rotary_embedding.h"

#include <posenc/frequencies.h>
#include <posenc/qk_norm_rotary_embedding.h>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <sstream>
#include <tuple>
#include <utility>

namespace posenc::bench {
namespace {

constexpr double kEps = 1e-6;

/// q and k are `[batch, sequence, heads, head_dim]`. Half pairing, and weights in the dtype of q and k, as in Qwen3.
struct Configuration {
  at::ScalarType dtype;
  int64_t batch;
  int64_t sequence;
  int64_t q_heads;
  int64_t k_heads;
  int64_t head_dim = 128;
  int64_t rotary_dim = 128;
};

std::string label(const Configuration& c) {
  std::ostringstream text;
  text << (c.dtype == at::kFloat ? "fp32" : "bf16") << "/B" << c.batch << "/S" << c.sequence << "/H" << c.q_heads << "x"
       << c.k_heads << "/D" << c.head_dim << "/R" << c.rotary_dim;
  return text.str();
}

std::string title(const Configuration& c) {
  std::ostringstream text;
  text << (c.dtype == at::kFloat ? "fp32" : "bf16") << ", batch " << c.batch << ", sequence " << c.sequence << ", "
       << c.q_heads << " query and " << c.k_heads << " key heads of " << c.head_dim;
  if (c.rotary_dim != c.head_dim) {
    text << ", rotary_dim " << c.rotary_dim;
  }
  return text.str();
}

/// Bytes of q and k together.
int64_t tensor_bytes(const Configuration& c) {
  const auto element = static_cast<int64_t>(at::elementSize(c.dtype));
  return c.batch * c.sequence * (c.q_heads + c.k_heads) * c.head_dim * element;
}

/// Minimum bytes of a pass. Forward reads and writes q and k. Backward reads q, k and gradients, and writes gradients.
/// Tables and weights are not counted.
int64_t minimum_traffic(const Configuration& c, Pass pass) {
  return (pass == Pass::forward ? 2 : 3) * tensor_bytes(c);
}

/// In this order: Qwen3-4B and -8B, Qwen3-32B, a batch of 4, a mixture of experts under tensor parallelism (one key
/// head per GPU), Gemma 3's head_dim, a partial rotation (GLM, Qwen3-Next), float32.
std::vector<Configuration> cuda_configurations() {
  return {{at::kBFloat16, 1, 8192, 32, 8},
          {at::kBFloat16, 1, 8192, 64, 8},
          {at::kBFloat16, 4, 8192, 32, 8},
          {at::kBFloat16, 1, 32768, 8, 1},
          {at::kBFloat16, 1, 8192, 16, 8, 256, 256},
          {at::kBFloat16, 1, 8192, 32, 8, 128, 64},
          {at::kFloat, 1, 8192, 32, 8}};
}

/// Sizes that take seconds on a few cores.
std::vector<Configuration> cpu_configurations() {
  return {{at::kFloat, 1, 2048, 32, 8}, {at::kBFloat16, 1, 2048, 32, 8}};
}

struct Arguments {
  at::Tensor q, k, q_weight, k_weight;
};

using Pair = std::tuple<at::Tensor, at::Tensor>;
using Operation = std::function<Pair(const Arguments&)>;
using OperationFactory = std::function<Operation(const Configuration&, c10::Device)>;

Pair make_tables(const Configuration& c, c10::Device device) {
  const auto [cos, sin] = rotary_tables(rotary_inv_freq(c.rotary_dim), c.sequence);
  return {cos.to(device), sin.to(device)};
}

Operation make_posenc(const Configuration& c, c10::Device device) {
  const auto [cos, sin] = make_tables(c, device);
  return [cos = cos, sin = sin](const Arguments& a) {
    return qk_norm_rotary_embedding(a.q, a.k, a.q_weight, a.k_weight, cos, sin, std::nullopt, kEps);
  };
}

// Qwen3's norm in Hugging Face transformers: computed in float32, rounded before it is multiplied by the weight.
at::Tensor norm_of_model(const at::Tensor& x, const at::Tensor& weight) {
  const auto wide = x.to(at::kFloat);
  const auto normalised = wide * at::rsqrt(wide.pow(2).mean(-1, /*keepdim=*/true) + kEps);
  return weight * normalised.to(x.scalar_type());
}

at::Tensor norm_of_libtorch(const at::Tensor& x, const at::Tensor& weight) {
  return at::rms_norm(x, {x.size(-1)}, weight, kEps);
}

using Norm = at::Tensor (*)(const at::Tensor& x, const at::Tensor& weight);

/// posenc, and every norm with every rotation in tensor operations.
std::vector<std::pair<std::string, OperationFactory>> implementations() {
  std::vector<std::pair<std::string, OperationFactory>> all{{kPosenc, make_posenc}};
  const std::pair<const char*, Norm> norms[] = {{"model_norm", norm_of_model}, {"rms_norm", norm_of_libtorch}};
  for (const auto& [norm_name, norm] : norms) {
    for (const auto& formulation : eager_rotary_embeddings(/*interleaved=*/false)) {
      const auto make = [norm = norm, formulation](const Configuration& c, c10::Device device) -> Operation {
        const auto [cos, sin] = make_tables(c, device);
        const auto rotate = formulation.make({cos, sin, c.dtype, /*sequence_dim=*/1});
        return [norm, rotate](const Arguments& a) {
          return Pair(rotate(norm(a.q, a.q_weight)), rotate(norm(a.k, a.k_weight)));
        };
      };
      all.emplace_back(std::string(norm_name) + "_" + formulation.name, make);
    }
  }
  return all;
}

/// Arguments of one configuration and the operation under test.
struct Problem {
  Problem(const Configuration& c, c10::Device device, const OperationFactory& factory) : operation(factory(c, device)) {
    const auto options = at::TensorOptions().dtype(c.dtype).device(device);
    const auto leaf = [](const at::Tensor& tensor) { return tensor.detach().requires_grad_(); };
    arguments = {
        leaf(at::randn({c.batch, c.sequence, c.q_heads, c.head_dim}, options)),
        leaf(at::randn({c.batch, c.sequence, c.k_heads, c.head_dim}, options)), leaf(at::ones({c.head_dim}, options)),
        leaf(at::ones({c.head_dim}, options))};
  }

  std::vector<at::Tensor> leaves() const { return {arguments.q, arguments.k, arguments.q_weight, arguments.k_weight}; }

  Arguments arguments;
  Operation operation;
};

Timing time_pass(Device& device, const Problem& problem, Pass pass) {
  if (pass == Pass::forward) {
    return measure([&] { return device.time([&] { problem.operation(problem.arguments); }); });
  }
  const auto [q, k] = problem.operation(problem.arguments);
  const std::vector<at::Tensor> outputs{q, k};
  const std::vector<at::Tensor> gradients{at::randn_like(q), at::randn_like(k)};
  return measure([&] {
    return device.time([&] { torch::autograd::grad(outputs, problem.leaves(), gradients, /*retain_graph=*/true); });
  });
}

Timing time_training_step(Device& device, const Problem& problem, Pass pass) {
  Pair results;
  Step step;
  step.forward = [&] { results = problem.operation(problem.arguments); };
  step.backward = [&] { (std::get<0>(results).sum() + std::get<1>(results).sum()).backward(); };
  step.clear = [&] {
    results = {};
    for (const at::Tensor& leaf : problem.leaves()) {
      leaf.mutable_grad().reset();
    }
  };
  return time_step(device, step, pass);
}

void add_configuration(Suite& suite, Device& device, Protocol protocol, const Configuration& c) {
  const auto add = [&](Pass pass, const std::string& implementation, int64_t bytes, const Suite::Body& body) {
    suite.add(Case{"QK-norm + RoPE", label(c), title(c), pass, implementation, bytes}, [&device, body] {
      device.release_memory();
      return body();
    });
  };
  if (protocol == Protocol::kernel) {
    for (const auto pass : {Pass::forward, Pass::backward}) {
      const int64_t bytes = minimum_traffic(c, pass);
      add(pass, kCopy, bytes, [&device, bytes] {
        const Work copy = device.make_copy(bytes / 2);
        return measure([&] { return device.time(copy); });
      });
      for (const auto& [name, factory] : implementations()) {
        add(pass, name, bytes, [&device, c, pass, factory = factory] {
          return time_pass(device, Problem(c, device.torch_device(), factory), pass);
        });
      }
    }
    return;
  }
  for (const auto pass : {Pass::forward, Pass::backward, Pass::total}) {
    for (const auto& [name, factory] : implementations()) {
      // No rate in bytes: wall time includes the host and two sums.
      add(pass, name, /*bytes=*/0, [&device, c, pass, factory = factory] {
        return time_training_step(device, Problem(c, device.torch_device(), factory), pass);
      });
    }
  }
}

}  // namespace

void add_qk_norm_rotary_embedding(Suite& suite, Device& device, Protocol protocol) {
  for (const auto& c : device.torch_device().is_cuda() ? cuda_configurations() : cpu_configurations()) {
    add_configuration(suite, device, protocol, c);
  }
}

}  // namespace posenc::bench
