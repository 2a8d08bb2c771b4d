#pragma once

#include <posenc/export.h>

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>

// Fused attention by cuDNN's graph API: the graphs and their plans. Bias and masks are a modifier of the scores.
// Without a bias the mask is cuDNN's own, and no modifier slows the kernels down. cuDNN silently returns wrong results
// for some graphs; cudnn_attention.cpp selects the ones that are used.
namespace posenc::cuda {

/// The bias of a score as a function of its row and column.
enum class CudnnBias : uint8_t {
  none,
  ramp,      // slope * (column - row - offset)
  distance,  // -slope * |row + offset - column|
};

enum class CudnnMask : uint8_t {
  none,
  causal,               // sees column <= row
  causal_bottom_right,  // sees column - Sk <= row - Sq
};

struct CudnnGraph {
  at::Tensor q, k, v;  // [B, S, H, D], dense channels
  at::Tensor slopes;   // float32 [Hq], dense; undefined without a bias
  // float32 [B, Sq]: the number of columns that each row sees, at least 1; undefined: all. Undefined without a bias.
  // [B]: cuDNN 9.19 computes wrong results.
  at::Tensor key_limits;
  CudnnBias bias;
  CudnnMask mask;
  int64_t offset;
  double scale;
};

// Exported for the benchmark, which times graphs without an operator around them.

/// The reason why graphs cannot be run: libcudnn is missing. Empty if they can.
POSENC_API const std::string& why_no_cudnn_graphs();

/// The version of the cuDNN that LibTorch has loaded: 91900 is 9.19.0. Call it after `why_no_cudnn_graphs`.
POSENC_API size_t cudnn_version();

/// The number of plans that this process has built.
POSENC_API int64_t cudnn_plans_built();

/// @return `(out, lse)`: in the layout of q, and float32 `[B, Hq, Sq]`.
POSENC_API std::tuple<at::Tensor, at::Tensor> run_cudnn_forward(const CudnnGraph& call);

/// @param lse  as returned by the forward pass; a row with infinity contributes nothing.
/// @return the gradients of q, k and v. Deterministic if LibTorch's deterministic algorithms are on.
POSENC_API std::tuple<at::Tensor, at::Tensor, at::Tensor> run_cudnn_backward(
    const CudnnGraph& call,
    const at::Tensor& grad_out,
    const at::Tensor& out,
    const at::Tensor& lse);

}  // namespace posenc::cuda
