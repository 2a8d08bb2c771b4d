#include "cases.h"
#include "eager_alibi.h"

#include <posenc/alibi.h>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <utility>

namespace posenc::bench {
namespace {

enum class Operator { bias, add, softmax };

struct Configuration {
  Operator op;
  at::ScalarType dtype;
  int64_t sequence;
  int64_t heads;
  /// Slopes require a gradient.
  bool learnable;
};

/// Scale of the scores in the softmax, for head_dim 128.
const double kScale = 1 / std::sqrt(128.0);

const char* encoding(const Configuration& c) {
  switch (c.op) {
    case Operator::bias:
      return "ALiBi bias";
    case Operator::add:
      return "ALiBi add";
    case Operator::softmax:
      break;
  }
  return "ALiBi softmax";
}

const char* dtype_name(const Configuration& c) {
  return c.dtype == at::kFloat ? "fp32" : "bf16";
}

std::string label(const Configuration& c) {
  std::ostringstream text;
  text << dtype_name(c) << "/B1/S" << c.sequence << "/H" << c.heads << (c.learnable ? "/learnable" : "/fixed");
  return text.str();
}

std::string title(const Configuration& c) {
  std::ostringstream text;
  text << dtype_name(c) << ", batch 1, sequence " << c.sequence << ", " << c.heads << " heads, "
       << (c.learnable ? "learnable slopes" : "fixed slopes")
       << (c.op == Operator::softmax ? ", with scale and causal mask" : "");
  return text.str();
}

/// Bytes of the scores, or of the bias.
int64_t tensor_bytes(const Configuration& c) {
  return c.heads * c.sequence * c.sequence * static_cast<int64_t>(at::elementSize(c.dtype));
}

using Sizes = std::vector<std::pair<int64_t, int64_t>>;  // sequence, heads

/// @param long_rows  more sizes for the softmax, whose kernel depends on the length of a row.
std::vector<Configuration> with_sizes(const Sizes& sizes, const Sizes& long_rows) {
  std::vector<Configuration> configurations;
  const auto add = [&](Operator op, at::ScalarType dtype, bool learnable, const Sizes& of_operator) {
    for (const auto& [sequence, heads] : of_operator) {
      configurations.push_back({op, dtype, sequence, heads, learnable});
    }
  };
  add(Operator::bias, at::kFloat, /*learnable=*/true, sizes);
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const bool learnable : {false, true}) {
      add(Operator::add, dtype, learnable, sizes);
    }
  }
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    add(Operator::softmax, dtype, /*learnable=*/false, sizes);
    add(Operator::softmax, dtype, /*learnable=*/false, long_rows);
  }
  return configurations;
}

/// The sizes measured in every release, and long rows in float32 tensors of a gigabyte. On a CPU, a size that takes
/// seconds on a few cores.
std::vector<Configuration> configurations(c10::Device device) {
  return device.is_cuda() ? with_sizes({{2048, 32}, {4096, 40}, {4096, 64}}, {{8192, 4}, {16384, 1}})
                          : with_sizes({{1024, 16}}, {});
}

/// The call under test. `slopes` are float32 on the device of the scores, as a model's parameter is.
using Call = std::function<at::Tensor(const at::Tensor& scores, const at::Tensor& slopes)>;

/// Makes a `Call` and its constants, which are freed when the case ends.
using CallFactory = std::function<Call(const Configuration&, c10::Device)>;

Call make_posenc(const Configuration& c, c10::Device /*device*/) {
  switch (c.op) {
    case Operator::bias:
      return [c](const at::Tensor& /*scores*/, const at::Tensor& slopes) {
        return alibi_bias(slopes, c.sequence, c.sequence);
      };
    case Operator::add:
      return [](const at::Tensor& scores, const at::Tensor& slopes) { return alibi_add(scores, slopes); };
    case Operator::softmax:
      break;
  }
  return [](const at::Tensor& scores, const at::Tensor& slopes) {
    return alibi_softmax(scores, slopes, kScale, /*causal=*/true);
  };
}

std::vector<std::pair<std::string, CallFactory>> implementations(const Configuration& configuration) {
  std::vector<std::pair<std::string, CallFactory>> all{{kPosenc, make_posenc}};
  const auto options = [](const Configuration& c, c10::Device device) {
    return EagerAlibiOptions{c.sequence, device, c.dtype};
  };
  if (configuration.op == Operator::softmax) {
    for (const auto& formulation : eager_alibi_softmaxes()) {
      all.emplace_back(formulation.name, [formulation, options](const Configuration& c, c10::Device device) -> Call {
        return [softmax = formulation.make(options(c, device))](const at::Tensor& scores, const at::Tensor& slopes) {
          return softmax(scores, slopes, kScale);
        };
      });
    }
    return all;
  }
  for (const auto& formulation : eager_alibi_biases(configuration.dtype)) {
    all.emplace_back(formulation.name, [formulation, options](const Configuration& c, c10::Device device) -> Call {
      return
          [op = c.op, bias = formulation.make(options(c, device))](const at::Tensor& scores, const at::Tensor& slopes) {
            return op == Operator::bias ? bias(slopes) : scores + bias(slopes);
          };
    });
  }
  return all;
}

/// Random scores of one configuration, the published slopes, and the call under test.
struct Problem {
  Problem(const Configuration& c, c10::Device device, const CallFactory& factory)
      : slopes(alibi_slopes(c.heads).to(device).requires_grad_(c.learnable)), call(factory(c, device)) {
    if (c.op != Operator::bias) {
      const auto options = at::TensorOptions().dtype(c.dtype).device(device);
      scores = at::randn({1, c.heads, c.sequence, c.sequence}, options).requires_grad_();
    }
  }

  at::Tensor run() const { return call(scores, slopes); }

  /// Tensors to compute gradients for.
  std::vector<at::Tensor> leaves() const {
    std::vector<at::Tensor> result;
    for (const at::Tensor& leaf : {scores, slopes}) {
      if (leaf.defined() && leaf.requires_grad()) {
        result.push_back(leaf);
      }
    }
    return result;
  }

  at::Tensor scores;
  at::Tensor slopes;
  Call call;
};

Timing time_forward(Device& device, const Problem& problem) {
  return measure([&] { return device.time([&] { problem.run(); }); });
}

/// The backward pass alone, with the gradient of the result given.
Timing time_backward(Device& device, const Problem& problem) {
  const at::Tensor output = problem.run();
  const std::vector<at::Tensor> inputs = problem.leaves();
  const at::Tensor gradient = at::randn_like(output);
  return measure(
      [&] { return device.time([&] { torch::autograd::grad({output}, inputs, {gradient}, /*retain_graph=*/true); }); });
}

/// A training step: forward pass, sum of the result, backward pass of the sum.
Timing time_training_step(Device& device, const Problem& problem, Pass pass) {
  at::Tensor output;
  Step step;
  step.forward = [&] { output = problem.run(); };
  step.backward = [&] { output.sum().backward(); };
  step.clear = [&] {
    output.reset();
    for (const at::Tensor& leaf : problem.leaves()) {
      leaf.mutable_grad().reset();
    }
  };
  return time_step(device, step, pass);
}

/// Minimum memory traffic of a pass, and the copy or fill that the pass is compared with.
struct Traffic {
  /// Bytes read and written.
  int64_t bytes;
  /// `kCopy` or `kFill`; empty if the pass moves no bytes.
  std::string yardstick;
  /// Bytes that `yardstick` copies or fills.
  int64_t yardstick_bytes;
};

Traffic traffic(const Configuration& c, Pass pass) {
  const int64_t tensor = tensor_bytes(c);
  const bool forward = pass == Pass::forward;
  switch (c.op) {
    case Operator::bias:
      // The gradient of slopes only reads. There is no yardstick that only reads, so it is compared with a copy.
      return forward ? Traffic{tensor, kFill, tensor} : Traffic{tensor, kCopy, tensor};
    case Operator::add:
      if (forward) {
        return {2 * tensor, kCopy, tensor};
      }
      // The gradient of scores is the incoming gradient in every implementation: no kernel runs.
      return c.learnable ? Traffic{tensor, kCopy, tensor} : Traffic{0, "", 0};
    case Operator::softmax:
      break;
  }
  // Backward reads probabilities and gradients and writes gradients.
  return forward ? Traffic{2 * tensor, kCopy, tensor} : Traffic{3 * tensor, kCopy, tensor * 3 / 2};
}

/// Registers the cases of one configuration.
class Registration {
 public:
  Registration(Suite& suite, Device& device, Configuration c) : suite_(suite), device_(device), c_(c) {}

  void add_kernel_cases() {
    for (const auto pass : {Pass::forward, Pass::backward}) {
      const Traffic moved = traffic(c_, pass);
      const auto describe_moved = [&](const std::string& implementation) {
        Case described = describe(pass, implementation, moved.bytes);
        described.trivial = moved.bytes == 0;
        return described;
      };
      if (!moved.yardstick.empty()) {
        suite_.add(describe_moved(moved.yardstick), [&device = device_, moved] {
          device.release_memory();
          const Work work = moved.yardstick == kFill ? device.make_fill(moved.yardstick_bytes)
                                                     : device.make_copy(moved.yardstick_bytes);
          return measure([&] { return device.time(work); });
        });
      }
      for (const auto& [name, factory] : implementations(c_)) {
        suite_.add(describe_moved(name), [pass, &device = device_, c = c_, factory = factory] {
          device.release_memory();
          const Problem problem(c, device.torch_device(), factory);
          return pass == Pass::forward ? time_forward(device, problem) : time_backward(device, problem);
        });
      }
    }
  }

  void add_wall_cases() {
    for (const auto pass : {Pass::forward, Pass::backward, Pass::total}) {
      for (const auto& [name, factory] : implementations(c_)) {
        // No rate in bytes: wall time includes the host and the sum.
        suite_.add(describe(pass, name, /*bytes=*/0), [pass, &device = device_, c = c_, factory = factory] {
          device.release_memory();
          const Problem problem(c, device.torch_device(), factory);
          return time_training_step(device, problem, pass);
        });
      }
    }
  }

 private:
  Case describe(Pass pass, const std::string& implementation, int64_t bytes) const {
    return {encoding(c_), label(c_), title(c_), pass, implementation, bytes};
  }

  Suite& suite_;
  Device& device_;
  Configuration c_;
};

}  // namespace

void add_alibi(Suite& suite, Device& device, Protocol protocol) {
  for (const auto& c : configurations(device.torch_device())) {
    Registration registration(suite, device, c);
    if (protocol == Protocol::kernel) {
      registration.add_kernel_cases();
    } else {
      registration.add_wall_cases();
    }
  }
}

}  // namespace posenc::bench
