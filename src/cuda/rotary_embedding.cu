#include <contract/rotary_embedding.h>
#include <cuda/detail/dispatch.h>
#include <cuda/detail/launch.h>
#include <cuda/rotary_embedding_kernel.cuh>
#include <posenc/logging.h>

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <mutex>

namespace posenc {
namespace {

using at::Tensor;

template <typename T, int V, bool Interleaved>
bool allows(const RotaryProblem& problem) {
  if constexpr (V > 1) {
    using Real = cuda::arithmetic_t<T>;
    constexpr int kEntries = Interleaved ? V / 2 : V;
    bool allowed = cuda::table_loads_vectors<Real, kEntries>(problem.cos) &&
        cuda::table_loads_vectors<Real, kEntries>(problem.sin);
    for (int i = 0; i < problem.num_operands; ++i) {
      const RotaryProblem::Operand& operand = problem.operands[i];
      allowed = allowed && cuda::loads_vectors<T, V>(operand.in, operand.in_strides) &&
          cuda::stores_vectors<T, V>(operand.out, operand.out_strides);
    }
    return allowed;
  }
  return true;
}

template <typename T, int V, bool Interleaved>
void launch(const RotaryProblem& problem) {
  const int64_t num_chunks = cuda::num_chunks(V, problem.num_pairs, problem.head_dim);
  const int64_t num_heads = problem.operands[0].num_heads + problem.operands[1].num_heads;
  const int64_t num_tokens = problem.batch * problem.seq_len;
  const auto [chunks, heads, tokens] = cuda::block_shape(num_chunks, num_heads, num_tokens);
  const int64_t grid_y = cuda::ceil_div(num_heads, heads);
  TORCH_CHECK(
      num_tokens <= std::numeric_limits<int32_t>::max() && grid_y <= cuda::kMaxGridY &&
          problem.head_dim <= std::numeric_limits<int32_t>::max(),
      "posenc::rotary_embedding: expected at most 2^31 - 1 tokens, ", cuda::kMaxGridY * heads,
      " heads and 2^31 - 1 channels on CUDA, got ", num_tokens, ", ", num_heads, " and ", problem.head_dim);
  if (log_level() <= LogLevel::debug) {
    log(LogLevel::debug,
        c10::str(
            "rotary_embedding: ", problem.interleaved ? "interleaved" : "half", " pairing, vectors of ", V,
            " elements of ", sizeof(T), " bytes, blocks of ", chunks, " x ", heads, " x ", tokens, " threads"));
  }
  const dim3 grid(cuda::ceil_div(num_tokens, tokens), grid_y);
  const dim3 block(chunks, heads, tokens);
  cuda::rotary_embedding_kernel<T, V, Interleaved>
      <<<grid, block, 0, c10::cuda::getCurrentCUDAStream()>>>(
          problem, cuda::Divider(static_cast<uint32_t>(problem.seq_len)), static_cast<int>(num_chunks));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void warn_of_narrow_vectors() {
  static std::once_flag once;
  std::call_once(once, [] {
    log(LogLevel::warning,
        "rotary_embedding: strides or addresses of the tensors or tables allow only narrower loads than their "
        "sizes would; dense channels and 16-byte aligned rows are fastest");
  });
}

/// Launches with the widest vectors that the call allows, V elements at most.
template <typename T, int V, bool Interleaved>
void launch_widest(const RotaryProblem& problem) {
  if constexpr (V > 1) {
    if (!cuda::divides(V, problem.num_pairs, problem.head_dim)) {
      return launch_widest<T, V / 2, Interleaved>(problem);
    }
    if (!allows<T, V, Interleaved>(problem)) {
      warn_of_narrow_vectors();
      return launch_widest<T, V / 2, Interleaved>(problem);
    }
  }
  launch<T, V, Interleaved>(problem);
}

void run(const RotaryProblem& problem, at::ScalarType dtype) {
  const int64_t num_heads = problem.operands[0].num_heads + problem.operands[1].num_heads;
  if (problem.batch * problem.seq_len * num_heads == 0) {
    return;
  }
  cuda::for_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    cuda::for_bool(problem.interleaved, [&](auto interleaved) {
      launch_widest<T, cuda::kMaxVectorBytes / sizeof(T), decltype(interleaved)::value>(problem);
    });
  });
}

Tensor rotary_embedding_cuda(
    const Tensor& x,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate) {
  auto problem = contract::rotary_problem(
      {"posenc::rotary_embedding", cos, sin, positions, interleaved, conjugate}, {"x", x});
  const c10::cuda::CUDAGuard device(x.device());
  Tensor output = contract::allocate_output(x, problem.operands[0]);
  run(problem, x.scalar_type());
  return output;
}

std::tuple<Tensor, Tensor> rotary_embedding_qk_cuda(
    const Tensor& q,
    const Tensor& k,
    const Tensor& cos,
    const Tensor& sin,
    const std::optional<Tensor>& positions,
    bool interleaved,
    bool conjugate) {
  const contract::Rotated rotated_k{"k", k};
  auto problem = contract::rotary_problem(
      {"posenc::rotary_embedding_qk", cos, sin, positions, interleaved, conjugate}, {"q", q}, &rotated_k);
  const c10::cuda::CUDAGuard device(q.device());
  Tensor q_out = contract::allocate_output(q, problem.operands[0]);
  Tensor k_out = contract::allocate_output(k, problem.operands[1]);
  run(problem, q.scalar_type());
  return {std::move(q_out), std::move(k_out)};
}

}  // namespace

TORCH_LIBRARY_IMPL(posenc, CUDA, m) {
  m.impl("rotary_embedding", rotary_embedding_cuda);
  m.impl("rotary_embedding_qk", rotary_embedding_qk_cuda);
}

}  // namespace posenc
