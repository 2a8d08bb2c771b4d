#include "cases.h"
#include "eager_rotary_embedding.h"

#include <posenc/frequencies.h>
#include <posenc/pair_axes.h>
#include <posenc/rotary_embedding.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

// Other forms of RoPE: packed QKV projections, in place, and multi-axis positions. One size each, which fits no cache
// of a GPU. Kernel times only: rotary_embedding.cpp measures the wall time of a training step.
namespace posenc::bench {
namespace {

using Tensors = std::vector<at::Tensor>;

struct Configuration {
  at::ScalarType dtype;
  int64_t batch, sequence, q_heads, kv_heads;
  int64_t head_dim = 128;
};

/// A call and its inputs, which are freed when the case ends.
struct Call {
  Tensors inputs;
  /// The forward call to time; autograd records nothing.
  std::function<void()> forward;
  /// The forward call recorded by autograd. Returns the outputs whose backward pass is timed.
  std::function<Tensors()> record;
};
using Factory = std::function<Call(const Configuration&, c10::Device)>;

/// One configuration of one form, and its implementations.
struct Form {
  std::string encoding, label, title;
  Configuration configuration;
  int64_t bytes;  // read by a pass; it writes as many
  std::vector<std::pair<std::string, Factory>> implementations;
};

at::TensorOptions options_of(const Configuration& c, c10::Device device) {
  return at::TensorOptions().dtype(c.dtype).device(device);
}

at::Tensor random_heads(const Configuration& c, int64_t heads, c10::Device device) {
  return at::randn({c.batch, c.sequence, heads, c.head_dim}, options_of(c, device)).requires_grad_();
}

std::pair<at::Tensor, at::Tensor> tables(const Configuration& c, c10::Device device) {
  const auto [cos, sin] = rotary_tables(rotary_inv_freq(c.head_dim), c.sequence);
  return {cos.to(device), sin.to(device)};
}

int64_t bytes_of(const Configuration& c, int64_t heads) {
  return c.batch * c.sequence * heads * c.head_dim * static_cast<int64_t>(at::elementSize(c.dtype));
}

/// A call that returns new tensors. `forward` and `record` run the same function.
Call out_of_place(Tensors inputs, const std::function<Tensors(const Tensors&)>& function) {
  const auto record = [inputs, function] { return function(inputs); };
  const auto forward = [record] {
    const at::NoGradGuard no_grad;
    record();
  };
  return {std::move(inputs), forward, record};
}

EagerRotation eager_rotation(const EagerFormulation& formulation, const Configuration& c, c10::Device device) {
  const auto [cos, sin] = tables(c, device);
  return formulation.make({cos, sin, c.dtype, /*sequence_dim=*/1});
}

// ---------------------------------------------------------------------------------------------------------------------
// Packed QKV projections

at::Tensor random_projection(const Configuration& c, bool stacked, c10::Device device) {
  const at::Tensor heads =
      at::randn({c.batch, c.sequence, c.q_heads + 2 * c.kv_heads, c.head_dim}, options_of(c, device));
  return (stacked ? heads.unflatten(2, {3, c.q_heads}) : heads.flatten(2)).requires_grad_();
}

Factory packed_posenc(bool stacked) {
  return [stacked](const Configuration& c, c10::Device device) {
    const auto [cos, sin] = tables(c, device);
    return out_of_place(
        {random_projection(c, stacked, device)}, [c, cos = cos, sin = sin](const Tensors& x) -> Tensors {
          const auto [q, k, v] = rotary_embedding_qkv(x[0], c.q_heads, c.kv_heads, cos, sin);
          return {q, k, v};
        });
  };
}

/// Splits the projection, rotates q and k, and makes v contiguous for attention.
Factory packed_eager(const EagerFormulation& formulation, bool stacked) {
  return [formulation, stacked](const Configuration& c, c10::Device device) {
    const EagerRotation rotate = eager_rotation(formulation, c, device);
    return out_of_place({random_projection(c, stacked, device)}, [c, stacked, rotate](const Tensors& x) -> Tensors {
      if (stacked) {
        const auto parts = x[0].unbind(2);
        return {rotate(parts[0]), rotate(parts[1]), parts[2].contiguous()};
      }
      const auto parts = x[0].unflatten(2, {-1, c.head_dim}).split_with_sizes({c.q_heads, c.kv_heads, c.kv_heads}, 2);
      return {rotate(parts[0]), rotate(parts[1]), parts[2].contiguous()};
    });
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// In place

Call in_place_posenc(const Configuration& c, c10::Device device) {
  const auto [cos, sin] = tables(c, device);
  const Tensors inputs{random_heads(c, c.q_heads, device), random_heads(c, c.kv_heads, device)};
  const auto rotate = [cos = cos, sin = sin](at::Tensor q, at::Tensor k) -> Tensors {
    rotary_embedding_qk_(q, k, cos, sin);
    return {q, k};
  };
  // The same tensors are rotated again in every run. A rotation keeps their norm, so values stay bounded.
  const Tensors rotated{inputs[0].detach().clone(), inputs[1].detach().clone()};
  return {
      inputs, [rotate, rotated] { rotate(rotated[0], rotated[1]); },
      [rotate, inputs] { return rotate(inputs[0].clone(), inputs[1].clone()); }};
}

Factory pair_eager(const EagerFormulation& formulation) {
  return [formulation](const Configuration& c, c10::Device device) {
    const EagerRotation rotate = eager_rotation(formulation, c, device);
    return out_of_place(
        {random_heads(c, c.q_heads, device), random_heads(c, c.kv_heads, device)},
        [rotate](const Tensors& x) -> Tensors { return {rotate(x[0]), rotate(x[1])}; });
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// Multi-axis positions

/// Positions `[3, B, S]` of time, height and width. Their values do not matter: each token reads its own table rows.
at::Tensor positions_of_axes(const Configuration& c, c10::Device device) {
  const at::Tensor token = at::arange(c.sequence, at::TensorOptions(at::kLong).device(device));
  const at::Tensor axes = at::stack({token.div(256, "floor"), token.remainder(256).div(16, "floor"), token});
  return axes.unsqueeze(1).expand({3, c.batch, c.sequence}).contiguous();
}

Factory mrope_posenc(const std::vector<int64_t>& pair_axes) {
  return [pair_axes](const Configuration& c, c10::Device device) {
    const auto [cos, sin] = tables(c, device);
    return out_of_place(
        {random_heads(c, c.q_heads, device), random_heads(c, c.kv_heads, device)},
        [cos = cos, sin = sin, pair_axes, positions = positions_of_axes(c, device)](const Tensors& x) -> Tensors {
          const auto [q, k] = rotary_embedding_qk(
              x[0], x[1], cos, sin, positions, /*interleaved=*/false, /*conjugate=*/false, pair_axes);
          return {q, k};
        });
  };
}

at::Tensor rotate_half(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const auto halves = x.chunk(2, -1);
  return x * cos + at::cat({-halves[1], halves[0]}, -1) * sin;
}

/// As in Hugging Face transformers: the tables of every token and axis are made once for all layers and are not timed.
/// Qwen2-VL selects the sections in every layer (timed), Qwen3-VL beforehand (not timed).
Factory mrope_eager(const std::vector<int64_t>& sections, bool interleaved) {
  return [sections, interleaved](const Configuration& c, c10::Device device) {
    const auto of_axes = [&](const at::Tensor& table) {  // [3, B, S, D]
      const at::Tensor rows = table.index({positions_of_axes(c, device)});
      return at::cat({rows, rows}, -1).to(c.dtype);
    };
    const auto axes = at::tensor(mrope_pair_axes(sections, interleaved), at::kLong).to(device);
    const auto chosen = [&](const at::Tensor& table) {  // [B, S, 1, D]
      const at::Tensor index = at::cat({axes, axes}).expand({1, c.batch, c.sequence, c.head_dim});
      return table.gather(0, index)[0].unsqueeze(2);
    };
    const auto [half_cos, half_sin] = tables(c, device);
    const at::Tensor cos = interleaved ? chosen(of_axes(half_cos)) : of_axes(half_cos);
    const at::Tensor sin = interleaved ? chosen(of_axes(half_sin)) : of_axes(half_sin);
    std::vector<int64_t> twice = sections;
    twice.insert(twice.end(), sections.begin(), sections.end());
    const auto choose = [interleaved, twice](const at::Tensor& table) {
      if (interleaved) {
        return table;
      }
      const auto parts = table.split_with_sizes(twice, -1);
      Tensors selected;
      for (size_t i = 0; i < parts.size(); ++i) {
        selected.push_back(parts[i][static_cast<int64_t>(i % 3)]);
      }
      return at::cat(selected, -1).unsqueeze(2);
    };
    return out_of_place(
        {random_heads(c, c.q_heads, device), random_heads(c, c.kv_heads, device)},
        [cos, sin, choose](const Tensors& x) -> Tensors {
          const at::Tensor cos_of_layer = choose(cos);
          const at::Tensor sin_of_layer = choose(sin);
          return {rotate_half(x[0], cos_of_layer, sin_of_layer), rotate_half(x[1], cos_of_layer, sin_of_layer)};
        });
  };
}

// ---------------------------------------------------------------------------------------------------------------------

std::string label_of(const Configuration& c, const std::string& form) {
  std::ostringstream text;
  text << (c.dtype == at::kBFloat16 ? "bf16" : "fp32") << "/B" << c.batch << "/S" << c.sequence << "/H" << c.q_heads
       << "x" << c.kv_heads << "/D" << c.head_dim << "/" << form;
  return text.str();
}

std::string title_of(const Configuration& c, const std::string& form) {
  std::ostringstream text;
  text << (c.dtype == at::kBFloat16 ? "bf16" : "fp32") << ", batch " << c.batch << ", sequence " << c.sequence << ", "
       << c.q_heads << " query and " << c.kv_heads << " key heads of " << c.head_dim << ", " << form;
  return text.str();
}

std::vector<Form> forms(bool cuda) {
  const auto at_size = [cuda](int64_t batch, int64_t q_heads, int64_t kv_heads) {
    return cuda ? Configuration{at::kBFloat16, batch, 8192, q_heads, kv_heads}
                : Configuration{at::kFloat, 1, 512, q_heads, kv_heads};
  };
  const auto with_eager = [](Factory posenc, const std::function<Factory(const EagerFormulation&)>& eager) {
    std::vector<std::pair<std::string, Factory>> all{{kPosenc, std::move(posenc)}};
    for (const auto& formulation : eager_rotary_embeddings(/*interleaved=*/false)) {
      all.emplace_back(formulation.name, eager(formulation));
    }
    return all;
  };
  std::vector<Form> all;
  for (const bool stacked : {false, true}) {
    const Configuration c = stacked ? at_size(1, 32, 32) : at_size(4, 32, 8);
    const std::string form = stacked ? "3xH" : "flat";
    all.push_back(
        {"RoPE packed", label_of(c, form), title_of(c, stacked ? "[B, S, 3, H, D]" : "[B, S, (Hq + 2 Hk) D]"), c,
         bytes_of(c, c.q_heads + 2 * c.kv_heads),
         with_eager(packed_posenc(stacked), [stacked](const EagerFormulation& formulation) {
           return packed_eager(formulation, stacked);
         })});
  }
  const Configuration in_place = at_size(1, 64, 64);
  all.push_back(
      {"RoPE in place", label_of(in_place, "half"), title_of(in_place, "in place"), in_place,
       bytes_of(in_place, in_place.q_heads + in_place.kv_heads), with_eager(in_place_posenc, pair_eager)});
  for (const bool interleaved : {false, true}) {
    const Configuration c = interleaved ? at_size(4, 32, 8) : at_size(4, 28, 4);
    const std::vector<int64_t> sections =
        interleaved ? std::vector<int64_t>{24, 20, 20} : std::vector<int64_t>{16, 24, 24};
    all.push_back(
        {"M-RoPE",
         label_of(c, interleaved ? "interleaved" : "chunked"),
         title_of(c, interleaved ? "interleaved sections (Qwen3-VL)" : "sections (Qwen2-VL)"),
         c,
         bytes_of(c, c.q_heads + c.kv_heads),
         {{kPosenc, mrope_posenc(mrope_pair_axes(sections, interleaved))},
          {"rotate_half", mrope_eager(sections, interleaved)}}});
  }
  return all;
}

Timing time_pass(Device& device, const Call& call, Pass pass) {
  if (pass == Pass::forward) {
    return measure([&] { return device.time(call.forward); });
  }
  const Tensors outputs = call.record();
  Tensors gradients;
  for (const at::Tensor& output : outputs) {
    gradients.push_back(at::randn_like(output));
  }
  return measure([&] {
    return device.time([&] { torch::autograd::grad(outputs, call.inputs, gradients, /*retain_graph=*/true); });
  });
}

}  // namespace

void add_rotary_embedding_forms(Suite& suite, Device& device) {
  for (const Form& form : forms(device.torch_device().is_cuda())) {
    for (const Pass pass : {Pass::forward, Pass::backward}) {
      const auto describe = [&](const std::string& implementation) {
        return Case{form.encoding, form.label, form.title, pass, implementation, 2 * form.bytes};
      };
      suite.add(describe(kCopy), [&device, bytes = form.bytes] {
        device.release_memory();
        const Work copy = device.make_copy(bytes);
        return measure([&] { return device.time(copy); });
      });
      for (const auto& [name, factory] : form.implementations) {
        suite.add(describe(name), [&device, pass, c = form.configuration, factory = factory] {
          device.release_memory();
          return time_pass(device, factory(c, device.torch_device()), pass);
        });
      }
    }
  }
}

}  // namespace posenc::bench
