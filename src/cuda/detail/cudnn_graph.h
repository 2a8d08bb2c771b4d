#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
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
  at::Tensor q, k, v;     // [B, S, H, D], dense channels
  at::Tensor slopes;      // float32 [Hq], dense; undefined without a bias
  at::Tensor key_limits;  // float32 [B, Sq]: the number of columns that each row sees, at least 1; undefined: all.
                          // Undefined without a bias
  CudnnBias bias;
  CudnnMask mask;
  int64_t offset;
  double scale;
};

/// The reason why the cuDNN that LibTorch has loaded cannot run these graphs: it is missing, or older than the version
/// that the graphs were validated with. Empty if it can.
const std::string& why_no_cudnn_graphs();

/// @return `(out, lse)`: in the layout of q, and float32 `[B, Hq, Sq]`.
std::tuple<at::Tensor, at::Tensor> run_cudnn_forward(const CudnnGraph& call);

/// @param lse  as returned by the forward pass; a row with infinity contributes nothing.
/// @return the gradients of q, k and v. Deterministic if LibTorch's deterministic algorithms are on.
std::tuple<at::Tensor, at::Tensor, at::Tensor> run_cudnn_backward(
    const CudnnGraph& call,
    const at::Tensor& grad_out,
    const at::Tensor& out,
    const at::Tensor& lse);

}  // namespace posenc::cuda
