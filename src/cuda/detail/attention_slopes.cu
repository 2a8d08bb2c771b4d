#include <cuda/detail/attention_slopes.h>
#include <cuda/detail/launch.h>
#include <cuda/detail/attention_slopes_kernel.cuh>

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <array>
#include <optional>

namespace posenc::cuda {
namespace {

using at::Tensor;

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

/// cuTensorMapEncodeTiled of the CUDA driver, looked up at run time: posenc does not link the driver.
EncodeTiled encode_tiled() {
  static const auto function = [] {
    constexpr unsigned kCuda = 12000;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
    C10_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kCuda, cudaEnableDefault, &status));
    TORCH_CHECK(
        status == cudaDriverEntryPointSuccess,
        "posenc::alibi_attention: expected a driver of CUDA 12.0 or later, got one without cuTensorMapEncodeTiled");
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

/// The tensor map of `x`, `[B, S, H, D]`, for copies of panels.
CUtensorMap tensor_map(const Tensor& x) {
  const auto extent = [&](int64_t d) { return static_cast<cuuint64_t>(x.size(d)); };
  // The stride of a dimension of size 1 is arbitrary.
  const auto bytes = [&](int64_t d) {
    return static_cast<cuuint64_t>(x.size(d) == 1 ? sm90::kPanelRowBytes : x.stride(d) * x.element_size());
  };
  const std::array<cuuint64_t, 4> sizes{extent(3), extent(1), extent(2), extent(0)};
  const std::array<cuuint64_t, 3> strides{bytes(1), bytes(2), bytes(0)};
  const std::array<cuuint32_t, 4> box{sm90::kPanelChannels, kSlopesKeys, 1, 1};
  const std::array<cuuint32_t, 4> steps{1, 1, 1, 1};
  CUtensorMap result;
  const CUresult status = encode_tiled()(
      &result, x.scalar_type() == at::kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      sizes.size(),
      const_cast<void*>(x.const_data_ptr()),  // NOLINT(cppcoreguidelines-pro-type-const-cast): as declared
      sizes.data(), strides.data(), box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TORCH_INTERNAL_ASSERT(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled: ", status, " for ", x.sizes(), x.strides());
  return result;
}

template <typename T, int D>
void launch_slopes(const AlibiAttentionSlopesProblem& problem, const dim3& grid) {
  const auto kernel = alibi_attention_slopes_kernel<T, D>;
  constexpr int kShared = SlopesTiles<D>::kShared;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  kernel<<<grid, kSlopesThreads, kShared, c10::cuda::getCurrentCUDAStream()>>>(problem);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void launch_slopes(int64_t head_dim, const AlibiAttentionSlopesProblem& problem, const dim3& grid) {
  // The head sizes for which cuDNN is used.
  switch (head_dim) {
    case 32:
      return launch_slopes<T, 32>(problem, grid);
    case 64:
      return launch_slopes<T, 64>(problem, grid);
    case 80:
      return launch_slopes<T, 80>(problem, grid);
    case 96:
      return launch_slopes<T, 96>(problem, grid);
    case 128:
      return launch_slopes<T, 128>(problem, grid);
    case 192:
      return launch_slopes<T, 192>(problem, grid);
    case 256:
      return launch_slopes<T, 256>(problem, grid);
    default:
      TORCH_INTERNAL_ASSERT(false, "cuDNN is not asked for heads of ", head_dim);
  }
}

/// Computes either the sums of blocks `[Hq, B, blocks]` or the sums of rows `[4, B, Hq, Sq]`.
void run(
    const blockwise::Padded& call,
    const Tensor& grad_out,
    const Tensor& lse,
    const std::optional<Tensor>& sums,
    const std::optional<Tensor>& row_sums) {
  // A thread of the autograd engine may have no CUDA context yet, and tensor maps do not create one.
  C10_CUDA_CHECK(cudaSetDevice(call.q.get_device()));
  const dim3 grid(ceil_div(call.q_len(), kSlopesRows), call.q_heads(), call.batch());
  const Tensor dense_lse = lse.contiguous();
  const Tensor slopes = call.slopes.contiguous();
  const auto lengths = [](const Tensor& seqlens) {
    return seqlens.defined() ? seqlens.const_data_ptr<int64_t>() : nullptr;
  };
  const Tensor seqlens_q = call.seqlens_q.defined() ? call.seqlens_q.contiguous() : Tensor();
  const Tensor seqlens_k = call.seqlens_k.defined() ? call.seqlens_k.contiguous() : Tensor();
  const AlibiAttentionSlopesProblem problem{
      tensor_map(call.q),
      tensor_map(call.k),
      tensor_map(call.v),
      tensor_map(grad_out),
      dense_lse.const_data_ptr<float>(),
      slopes.const_data_ptr<float>(),
      lengths(seqlens_q),
      lengths(seqlens_k),
      sums.has_value() ? sums->mutable_data_ptr<double>() : nullptr,
      row_sums.has_value() ? row_sums->mutable_data_ptr<double>() : nullptr,
      static_cast<int32_t>(call.q_len()),
      static_cast<int32_t>(call.k_len()),
      static_cast<int32_t>(call.query_offset.value()),
      static_cast<int32_t>(call.q_heads() / call.k_heads()),
      static_cast<float>(call.scale),
      call.causal};
  if (call.q.scalar_type() == at::kHalf) {
    launch_slopes<__half>(call.head_dim(), problem, grid);
  } else {
    launch_slopes<__nv_bfloat16>(call.head_dim(), problem, grid);
  }
}

}  // namespace

bool has_attention_slopes_kernels() {
  int device = 0;
  int major = 0;
  int minor = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;  // sm_90a
}

Tensor attention_slopes_backward(const blockwise::Padded& call, const Tensor& grad_out, const Tensor& lse) {
  const int64_t heads = call.q_heads();
  const int64_t blocks = ceil_div(call.q_len(), kSlopesRows);
  const Tensor sums = at::empty({heads, call.batch(), blocks}, call.q.options().dtype(at::kDouble));
  run(call, grad_out, lse, sums, std::nullopt);
  Tensor result = at::empty({heads}, call.q.options().dtype(at::kFloat));
  sum_of_heads_kernel<float><<<dim3(heads), kHeadSumThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      sums.const_data_ptr<double>(), call.batch() * blocks, result.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

Tensor attention_slope_sums(const blockwise::Padded& call, const Tensor& grad_out, const Tensor& lse) {
  Tensor result = at::empty({4, call.batch(), call.q_heads(), call.q_len()}, call.q.options().dtype(at::kDouble));
  run(call, grad_out, lse, std::nullopt, result);
  return result;
}

}  // namespace posenc::cuda
