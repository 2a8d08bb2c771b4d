#include "cases.h"
#include "eager_rotary_embedding.h"

#include <posenc/frequencies.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <sstream>
#include <tuple>
#include <utility>

namespace posenc::bench {
namespace {

struct Configuration {
  at::ScalarType dtype;
  int64_t batch;
  int64_t sequence;
  int64_t q_heads;
  int64_t k_heads;
  int64_t head_dim = 128;
  int64_t rotary_dim = 128;
  bool interleaved = false;
  /// Memory in the order batch, head, sequence, channel; otherwise batch, sequence, head, channel.
  bool bhsd = false;
};

const char* dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return "fp16";
    case at::kBFloat16:
      return "bf16";
    case at::kFloat:
      return "fp32";
    default:
      TORCH_CHECK(false, "no short name for ", dtype);
  }
}

std::string label(const Configuration& c) {
  std::ostringstream text;
  text << dtype_name(c.dtype) << "/B" << c.batch << "/S" << c.sequence << "/H" << c.q_heads << "x" << c.k_heads << "/D"
       << c.head_dim << (c.bhsd ? "/bhsd" : "/bshd") << (c.interleaved ? "/interleaved" : "/half") << "/R"
       << c.rotary_dim;
  return text.str();
}

std::string title(const Configuration& c) {
  std::ostringstream text;
  text << dtype_name(c.dtype) << ", batch " << c.batch << ", sequence " << c.sequence << ", ";
  if (c.q_heads == c.k_heads) {
    text << c.q_heads << " heads of " << c.head_dim;
  } else {
    text << c.q_heads << " query and " << c.k_heads << " key heads of " << c.head_dim;
  }
  if (c.rotary_dim != c.head_dim) {
    text << ", rotary_dim " << c.rotary_dim;
  }
  text << (c.interleaved ? ", interleaved" : "") << (c.bhsd ? ", strided (bhsd)" : "");
  return text.str();
}

/// Bytes of q and k together.
int64_t tensor_bytes(const Configuration& c) {
  const auto element = static_cast<int64_t>(at::elementSize(c.dtype));
  return c.batch * c.sequence * (c.q_heads + c.k_heads) * c.head_dim * element;
}

/// The sizes measured in every release, a batch with grouped-query heads, and three variants (layout, pairing, partial
/// rotation) of one size, whose q and k (134 MB together) fit no cache.
std::vector<Configuration> cuda_configurations() {
  std::vector<Configuration> configurations;
  for (const auto dtype : {at::kHalf, at::kBFloat16, at::kFloat}) {
    configurations.push_back({dtype, 1, 2048, 32, 32});
    configurations.push_back({dtype, 1, 4096, 40, 40});
    configurations.push_back({dtype, 1, 4096, 64, 64});
    configurations.push_back({dtype, 1, 8192, 64, 64});
  }
  configurations.push_back({at::kBFloat16, 4, 8192, 32, 8});
  const Configuration base{at::kBFloat16, 1, 8192, 32, 32};
  configurations.insert(configurations.end(), 3, base);
  const auto variants = configurations.end() - 3;
  variants[0].bhsd = true;
  variants[1].interleaved = true;
  variants[2].rotary_dim = 64;
  return configurations;
}

/// Sizes that take seconds on a few cores.
std::vector<Configuration> cpu_configurations() {
  return {
      {at::kFloat, 1, 2048, 32, 32},
      {at::kBFloat16, 1, 2048, 32, 32},
      {at::kFloat, 2, 1024, 32, 8},
  };
}

using Pair = std::tuple<at::Tensor, at::Tensor>;

/// The call under test: returns rotated q and k, in the layout of the configuration.
using Rotation = std::function<Pair(const at::Tensor& q, const at::Tensor& k)>;

/// Makes a `Rotation` and its tables, which are freed when the case ends.
using RotationFactory = std::function<Rotation(const Configuration&, c10::Device)>;

Pair make_tables(const Configuration& c, c10::Device device) {
  const auto [cos, sin] = rotary_tables(rotary_inv_freq(c.rotary_dim), c.sequence);
  return {cos.to(device), sin.to(device)};
}

Rotation make_posenc(const Configuration& c, c10::Device device) {
  const auto [cos, sin] = make_tables(c, device);
  auto rotate = [cos = cos, sin = sin, interleaved = c.interleaved](const at::Tensor& q, const at::Tensor& k) {
    return rotary_embedding_qk(q, k, cos, sin, std::nullopt, interleaved);
  };
  if (!c.bhsd) {
    return rotate;
  }
  return [rotate](const at::Tensor& q, const at::Tensor& k) -> Pair {
    const auto [q_rotated, k_rotated] = rotate(q.transpose(1, 2), k.transpose(1, 2));
    return {q_rotated.transpose(1, 2), k_rotated.transpose(1, 2)};
  };
}

Rotation make_eager(const EagerFormulation& formulation, const Configuration& c, c10::Device device) {
  const auto [cos, sin] = make_tables(c, device);
  const auto rotate = formulation.make({cos, sin, c.dtype, /*sequence_dim=*/c.bhsd ? 2 : 1});
  return [rotate](const at::Tensor& q, const at::Tensor& k) { return Pair(rotate(q), rotate(k)); };
}

/// Random tensors of one configuration and the rotation to apply to them.
struct Problem {
  Problem(const Configuration& c, c10::Device device, const RotationFactory& factory)
      : q(random_tensor(c, c.q_heads, device).requires_grad_()),
        k(random_tensor(c, c.k_heads, device).requires_grad_()),
        rotate(factory(c, device)) {
    const auto [q_rotated, k_rotated] = rotate(q, k);
    TORCH_CHECK(
        q_rotated.sizes() == q.sizes() && k_rotated.sizes() == k.sizes(), "the rotation changed the shape of q or k");
  }

  static at::Tensor random_tensor(const Configuration& c, int64_t heads, c10::Device device) {
    const auto options = at::TensorOptions().dtype(c.dtype).device(device);
    return c.bhsd ? at::randn({c.batch, heads, c.sequence, c.head_dim}, options)
                  : at::randn({c.batch, c.sequence, heads, c.head_dim}, options);
  }

  at::Tensor q;
  at::Tensor k;
  Rotation rotate;
};

Timing time_forward(Device& device, Problem& problem) {
  return measure([&] { return device.time([&] { problem.rotate(problem.q, problem.k); }); });
}

/// The backward pass alone, with the gradients of the rotated pair given.
Timing time_backward(Device& device, Problem& problem) {
  const auto [q_rotated, k_rotated] = problem.rotate(problem.q, problem.k);
  const std::vector<at::Tensor> outputs{q_rotated, k_rotated};
  const std::vector<at::Tensor> inputs{problem.q, problem.k};
  const std::vector<at::Tensor> gradients{at::randn_like(problem.q), at::randn_like(problem.k)};
  return measure(
      [&] { return device.time([&] { torch::autograd::grad(outputs, inputs, gradients, /*retain_graph=*/true); }); });
}

/// A training step: forward pass, sum of the results, backward pass of the sum.
Timing time_training_step(Device& device, Problem& problem, Pass pass) {
  Pair rotated;
  Step step;
  step.forward = [&] { rotated = problem.rotate(problem.q, problem.k); };
  step.backward = [&] { (std::get<0>(rotated).sum() + std::get<1>(rotated).sum()).backward(); };
  step.clear = [&] {
    rotated = {};
    problem.q.mutable_grad().reset();
    problem.k.mutable_grad().reset();
  };
  return time_step(device, step, pass);
}

/// Registers the cases of one configuration.
class Registration {
 public:
  Registration(Suite& suite, Device& device, Configuration c) : suite_(suite), device_(device), c_(c) {}

  void add_kernel_cases() {
    for (const auto pass : {Pass::forward, Pass::backward}) {
      suite_.add(describe(pass, kCopy, minimum_traffic()), [&device = device_, bytes = tensor_bytes(c_)] {
        return with_released_memory(device, [&] {
          const Work copy = device.make_copy(bytes);
          return measure([&] { return device.time(copy); });
        });
      });
      for (const auto& [name, factory] : implementations()) {
        suite_.add(describe(pass, name, minimum_traffic()), [pass, &device = device_, c = c_, factory = factory] {
          return with_released_memory(device, [&] {
            Problem problem(c, device.torch_device(), factory);
            return pass == Pass::forward ? time_forward(device, problem) : time_backward(device, problem);
          });
        });
      }
    }
  }

  void add_wall_cases() {
    for (const auto pass : {Pass::forward, Pass::backward, Pass::total}) {
      for (const auto& [name, factory] : implementations()) {
        // No rate in bytes: wall time includes the host and two sums.
        suite_.add(describe(pass, name, /*bytes=*/0), [pass, &device = device_, c = c_, factory = factory] {
          return with_released_memory(device, [&] {
            Problem problem(c, device.torch_device(), factory);
            return time_training_step(device, problem, pass);
          });
        });
      }
    }
  }

 private:
  template <typename Measurement>
  static Timing with_released_memory(Device& device, const Measurement& measurement) {
    device.release_memory();
    return measurement();
  }

  std::vector<std::pair<std::string, RotationFactory>> implementations() const {
    std::vector<std::pair<std::string, RotationFactory>> all{{kPosenc, make_posenc}};
    for (const auto& formulation : eager_rotary_embeddings(c_.interleaved)) {
      all.emplace_back(formulation.name, [formulation](const Configuration& c, c10::Device device) {
        return make_eager(formulation, c, device);
      });
    }
    return all;
  }

  /// Reads and writes q and k, or their gradients, once. The tables, 1 % of that at 64 heads, are not counted.
  int64_t minimum_traffic() const { return 2 * tensor_bytes(c_); }

  Case describe(Pass pass, const std::string& implementation, int64_t bytes) const {
    return {"RoPE", label(c_), title(c_), pass, implementation, bytes};
  }

  Suite& suite_;
  Device& device_;
  Configuration c_;
};

}  // namespace

void add_rotary_embedding(Suite& suite, Device& device, Protocol protocol) {
  for (const auto& c : device.torch_device().is_cuda() ? cuda_configurations() : cpu_configurations()) {
    Registration registration(suite, device, c);
    if (protocol == Protocol::kernel) {
      registration.add_kernel_cases();
    } else {
      registration.add_wall_cases();
    }
  }
}

}  // namespace posenc::bench
