#include <cuda/detail/cudnn_graph.h>
#include <cuda/detail/plan_cache.h>
#include <posenc/detail/stream_capture.h>
#include <posenc/logging.h>

#include <ATen/Context.h>
#include <ATen/cudnn/Handle.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAFunctions.h>

// LibTorch has loaded libcudnn. Symbols are looked up in that copy, so posenc does not link cuDNN.
#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include <cudnn_frontend.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // declared by the frontend's headers, which look symbols up in it
}

namespace posenc::cuda {
namespace {

namespace fe = cudnn_frontend;
using at::Tensor;
using Attributes = std::shared_ptr<fe::graph::Tensor_attributes>;
using Graph = std::shared_ptr<fe::graph::Graph>;
using Mode = fe::PointwiseMode_t;

constexpr auto kInt = fe::DataType_t::INT32;
constexpr auto kReal = fe::DataType_t::FLOAT;

/// Limit of the cache, whose plans take up to some megabytes each. Lengths that change with every batch add plans.
constexpr size_t kMaxPlans = 128;

/// The names of tensors in a graph.
enum Uid : int64_t { kQ = 1, kK, kV, kOut, kLse, kGradOut, kGradQ, kGradK, kGradV, kSlopes, kKeyLimits, kUids };

/// Pointers indexed by `Uid`. A map would allocate for each tensor of each call.
using Pointers = std::array<void*, kUids>;

// ---------------------------------------------------------------------------------------------------------------------
// Plans

struct Plan {
  fe::graph::Graph graph;
  std::vector<int64_t> uids;  // of the tensors, in the order in which the graph expects them
  int64_t workspace = 0;
  std::mutex mutex;  // a graph is executed by one thread at a time
};

using Plans = PlanCache<Plan>;

Plans& plans() {
  // Never destroyed: at exit cuDNN may be unloaded first.
  static auto* const cache = new Plans(kMaxPlans);  // NOLINT(cppcoreguidelines-owning-memory)
  return *cache;
}

enum class Direction : uint8_t { forward, backward };

const char* to_string(Direction direction) {
  return direction == Direction::forward ? "forward" : "backward";
}

PlanKey key_of(
    const CudnnGraph& call,
    Direction direction,
    bool deterministic,
    std::initializer_list<std::reference_wrapper<const Tensor>> tensors) {
  int64_t scale_bits = 0;
  std::memcpy(&scale_bits, &call.scale, sizeof(scale_bits));
  const std::array<int64_t, 9> rest{
      c10::cuda::current_device(),
      static_cast<int64_t>(call.q.scalar_type()),
      static_cast<int64_t>(call.bias),
      static_cast<int64_t>(call.mask),
      call.key_limits.defined() ? call.key_limits.dim() : 0,
      call.offset,
      scale_bits,
      static_cast<int64_t>(direction),
      deterministic ? 1 : 0};
  constexpr size_t kPerTensor = 8;  // sizes and strides of four dimensions
  PlanKey key;
  key.reserve(rest.size() + kPerTensor * tensors.size());
  key.insert(key.end(), rest.begin(), rest.end());
  for (const Tensor& tensor : tensors) {
    key.insert(key.end(), tensor.sizes().begin(), tensor.sizes().end());
    key.insert(key.end(), tensor.strides().begin(), tensor.strides().end());
  }
  return key;
}

void check(fe::error_t status, Direction direction) {
  TORCH_CHECK(
      status.is_good(), "posenc::alibi_attention: expected cuDNN to run its ", to_string(direction),
      " pass, got: ", status.get_message(), "; at::globalContext().setUserEnabledCuDNN(false) does without cuDNN");
}

// ---------------------------------------------------------------------------------------------------------------------
// Graphs

fe::DataType_t data_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf ? fe::DataType_t::HALF : fe::DataType_t::BFLOAT16;
}

/// Sizes and strides of a tensor with dimensions in cuDNN's order: batch, head, token, channel.
struct Layout {
  std::vector<int64_t> sizes, strides;
};

/// `[B, S, H, D]` as `[B, H, S, D]`.
Layout heads_first(const Tensor& x) {
  const Tensor transposed = x.transpose(1, 2);
  return {transposed.sizes().vec(), transposed.strides().vec()};
}

/// A tensor `[B, heads, Sq, 1]` with one number for each row.
Layout of_rows(const CudnnGraph& call, int64_t heads) {
  const int64_t q_len = call.q.size(1);
  return {{call.q.size(0), heads, q_len, 1}, {heads * q_len, q_len, 1, 1}};
}

Attributes input(fe::graph::Graph& graph, Uid uid, const Layout& layout, fe::DataType_t type) {
  return graph.tensor(fe::graph::Tensor_attributes()
                          .set_uid(uid)
                          .set_name("tensor" + std::to_string(uid))
                          .set_dim(layout.sizes)
                          .set_stride(layout.strides)
                          .set_data_type(type));
}

Attributes input(fe::graph::Graph& graph, Uid uid, const Tensor& tensor) {
  return input(graph, uid, heads_first(tensor), data_type(tensor));
}

void output(const Attributes& attributes, Uid uid, const Layout& layout, fe::DataType_t type) {
  attributes->set_output(true).set_uid(uid).set_dim(layout.sizes).set_stride(layout.strides).set_data_type(type);
}

void output(const Attributes& attributes, Uid uid, const Tensor& tensor) {
  output(attributes, uid, heads_first(tensor), data_type(tensor));
}

/// Bias and masks as a modifier of the scores. cuDNN calls it once for each graph and pass.
class ScoreModifier {
 public:
  ScoreModifier(fe::graph::Graph& graph, const CudnnGraph& call)
      : bias_(call.bias), mask_(call.mask), q_len_(call.q.size(1)), k_len_(call.k.size(1)), offset_(call.offset) {
    const int64_t heads = call.q.size(2);
    slopes_ = input(graph, kSlopes, {{1, heads, 1, 1}, {heads, 1, 1, 1}}, kReal);
    if (call.key_limits.defined()) {
      const int64_t batch = call.q.size(0);
      const Layout of_sequences{{batch, 1, 1, 1}, {1, 1, 1, 1}};
      key_limits_ = input(graph, kKeyLimits, call.key_limits.dim() == 1 ? of_sequences : of_rows(call, 1), kReal);
    }
  }

  Attributes operator()(const Graph& graph, const Attributes& scores) const {
    namespace modifiers = fe::graph::attn::score_modifiers;
    const Attributes column = index(graph, scores, 3);
    Attributes row = index(graph, scores, 2);
    if (offset_ != 0) {
      row = apply(
          graph, Mode::ADD, kInt, row, std::make_shared<fe::graph::Tensor_attributes>(static_cast<int32_t>(offset_)));
    }
    Attributes result;
    if (bias_ == CudnnBias::ramp) {
      const Attributes ahead = apply(graph, Mode::SUB, kInt, column, row);
      result = apply(graph, Mode::ADD, kReal, scores, apply(graph, Mode::MUL, kReal, ahead, slopes_));
    } else {
      const Attributes distance = absolute(graph, apply(graph, Mode::SUB, kInt, row, column));
      result = apply(graph, Mode::SUB, kReal, scores, apply(graph, Mode::MUL, kReal, distance, slopes_));
    }
    if (key_limits_ != nullptr) {
      const Attributes visible = apply(graph, Mode::CMP_LT, kReal, column, key_limits_);
      visible->set_data_type(fe::DataType_t::BOOLEAN);
      result = graph->pointwise(
          result, std::make_shared<fe::graph::Tensor_attributes>(modifiers::get_negative_inf_value()), visible,
          fe::graph::Pointwise_attributes().set_mode(Mode::BINARY_SELECT));
    }
    // cuDNN skips masked tiles only if its own mask is the last operation.
    if (mask_ == CudnnMask::causal) {
      return modifiers::causal_mask(graph, result);
    }
    if (mask_ == CudnnMask::causal_bottom_right) {
      return modifiers::causal_mask_bottom_right(graph, result, q_len_, k_len_, nullptr, nullptr);
    }
    return result;
  }

 private:
  static Attributes index(const Graph& graph, const Attributes& scores, int64_t axis) {
    Attributes result = graph->pointwise(
        scores, fe::graph::Pointwise_attributes().set_mode(Mode::GEN_INDEX).set_axis(axis).set_compute_data_type(kInt));
    result->set_data_type(kInt);
    return result;
  }

  static Attributes apply(
      const Graph& graph,
      Mode mode,
      fe::DataType_t type,
      const Attributes& a,
      const Attributes& b) {
    Attributes result =
        graph->pointwise(a, b, fe::graph::Pointwise_attributes().set_mode(mode).set_compute_data_type(type));
    result->set_data_type(type);
    return result;
  }

  static Attributes absolute(const Graph& graph, const Attributes& a) {
    Attributes result =
        graph->pointwise(a, fe::graph::Pointwise_attributes().set_mode(Mode::ABS).set_compute_data_type(kReal));
    result->set_data_type(kReal);
    return result;
  }

  CudnnBias bias_;
  CudnnMask mask_;
  int64_t q_len_, k_len_, offset_;
  Attributes slopes_, key_limits_;
};

/// Adds bias and masks of a call to the attributes of a forward or backward pass.
template <typename SdpaAttributes>
SdpaAttributes with_bias_and_mask(SdpaAttributes attributes, fe::graph::Graph& graph, const CudnnGraph& call) {
  if (call.bias != CudnnBias::none) {
    attributes.set_score_mod(ScoreModifier(graph, call));
  } else if (call.mask == CudnnMask::causal) {
    attributes.set_causal_mask(true);
  } else if (call.mask == CudnnMask::causal_bottom_right) {
    attributes.set_causal_mask_bottom_right(true);
  }
  return attributes;
}

std::atomic<int64_t> plans_built{0};

template <typename AddNodes>
std::shared_ptr<Plan> build(const CudnnGraph& call, Direction direction, const AddNodes& add_nodes) {
  const auto start = std::chrono::steady_clock::now();
  auto plan = std::make_shared<Plan>();
  plan->graph.set_io_data_type(data_type(call.q)).set_intermediate_data_type(kReal).set_compute_data_type(kReal);
  add_nodes(plan->graph);
  check(plan->graph.build(at::native::getCudnnHandle(), {fe::HeurMode_t::A}), direction);
  check(plan->graph.get_workspace_size(plan->workspace), direction);
  plan->uids = plan->graph.get_variant_pack_uids_sorted();
  for (const int64_t uid : plan->uids) {
    TORCH_INTERNAL_ASSERT(uid >= kQ && uid < kUids, "a tensor of no name, ", uid);
  }
  ++plans_built;
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
  log(LogLevel::debug,
      c10::str(
          "alibi_attention: cuDNN plan for the ", to_string(direction), " pass of q ", call.q.sizes(), " and k ",
          call.k.sizes(), " ", call.q.scalar_type(), " built in ", took.count(), " ms, workspace ", plan->workspace,
          " bytes"));
  return plan;
}

void* pointer(const Tensor& tensor) {
  // The frontend has one type for inputs and outputs.
  return const_cast<void*>(tensor.const_data_ptr());  // NOLINT(cppcoreguidelines-pro-type-const-cast)
}

/// @param pointers  of the tensors that the passes do not share.
void execute(Plan& plan, const CudnnGraph& call, Direction direction, Pointers pointers) {
  pointers[kQ] = pointer(call.q);
  pointers[kK] = pointer(call.k);
  pointers[kV] = pointer(call.v);
  if (call.slopes.defined()) {
    pointers[kSlopes] = pointer(call.slopes);
  }
  if (call.key_limits.defined()) {
    pointers[kKeyLimits] = pointer(call.key_limits);
  }
  Pointers sorted{};
  std::transform(plan.uids.begin(), plan.uids.end(), sorted.begin(), [&](int64_t uid) {
    return pointers[static_cast<size_t>(uid)];
  });
  const Tensor workspace = at::empty({plan.workspace}, call.q.options().dtype(at::kByte));
  const std::lock_guard<std::mutex> lock(plan.mutex);
  check(
      plan.graph.execute(
          at::native::getCudnnHandle(), sorted.data(), static_cast<int>(plan.uids.size()),
          workspace.mutable_data_ptr()),
      direction);
}

}  // namespace

const std::string& why_no_cudnn_graphs() {
  static const std::string reason = []() -> std::string {
    fe::cudnn_dlhandle = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
    return fe::cudnn_dlhandle == nullptr ? "libcudnn.so.9 was not found" : "";
  }();
  return reason;
}

int64_t cudnn_plans_built() {
  return plans_built;
}

size_t cudnn_version() {
  return fe::detail::get_backend_version();
}

std::tuple<Tensor, Tensor> run_cudnn_forward(const CudnnGraph& call) {
  Tensor out = at::empty_like(call.q);
  Tensor lse = at::empty({call.q.size(0), call.q.size(2), call.q.size(1)}, call.q.options().dtype(at::kFloat));
  const auto plan = plans().get(
      key_of(call, Direction::forward, /*deterministic=*/false, {call.q, call.k, call.v, out}),
      detail::is_capturing(call.q.device()), [&] {
        return build(call, Direction::forward, [&](fe::graph::Graph& graph) {
          const auto attributes = fe::graph::SDPA_attributes()
                                      .set_name("alibi_attention")
                                      .set_generate_stats(true)
                                      .set_attn_scale(static_cast<float>(call.scale));
          const auto [o, stats] = graph.sdpa(
              input(graph, kQ, call.q), input(graph, kK, call.k), input(graph, kV, call.v),
              with_bias_and_mask(attributes, graph, call));
          output(o, kOut, out);
          output(stats, kLse, of_rows(call, call.q.size(2)), kReal);
        });
      });
  Pointers pointers{};
  pointers[kOut] = out.mutable_data_ptr();
  pointers[kLse] = lse.mutable_data_ptr();
  execute(*plan, call, Direction::forward, pointers);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> run_cudnn_backward(
    const CudnnGraph& call,
    const Tensor& grad_out,
    const Tensor& out,
    const Tensor& lse) {
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  Tensor grad_q = at::empty_like(call.q);
  Tensor grad_k = at::empty_like(call.k);
  Tensor grad_v = at::empty_like(call.v);
  const auto plan = plans().get(
      key_of(call, Direction::backward, deterministic, {call.q, call.k, call.v, out, grad_out, grad_q, grad_k, grad_v}),
      detail::is_capturing(call.q.device()), [&] {
        return build(call, Direction::backward, [&](fe::graph::Graph& graph) {
          // The gradient passes an added bias unchanged, so set_score_mod_bprop is not needed.
          const auto attributes = fe::graph::SDPA_backward_attributes()
                                      .set_name("alibi_attention_backward")
                                      .set_attn_scale(static_cast<float>(call.scale))
                                      .set_deterministic_algorithm(deterministic);
          const auto [dq, dk, dv] = graph.sdpa_backward(
              input(graph, kQ, call.q), input(graph, kK, call.k), input(graph, kV, call.v), input(graph, kOut, out),
              input(graph, kGradOut, grad_out), input(graph, kLse, of_rows(call, call.q.size(2)), kReal),
              with_bias_and_mask(attributes, graph, call));
          output(dq, kGradQ, grad_q);
          output(dk, kGradK, grad_k);
          output(dv, kGradV, grad_v);
        });
      });
  Pointers pointers{};
  pointers[kOut] = pointer(out);
  pointers[kLse] = pointer(lse);
  pointers[kGradOut] = pointer(grad_out);
  pointers[kGradQ] = grad_q.mutable_data_ptr();
  pointers[kGradK] = grad_k.mutable_data_ptr();
  pointers[kGradV] = grad_v.mutable_data_ptr();
  execute(*plan, call, Direction::backward, pointers);
  return {grad_q, grad_k, grad_v};
}

}  // namespace posenc::cuda
