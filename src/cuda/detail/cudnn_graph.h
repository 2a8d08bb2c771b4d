#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

// Fused attention by cuDNN's graph API, with bias and masks as a modifier of the scores: graphs, and the plans made of
// them. cuDNN answers some graphs wrongly without an error: cudnn_attention.cpp decides which ones are asked for.
namespace posenc::cuda {

/// How the bias of a score is formed of its row and column.
enum class CudnnBias : uint8_t {
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
  at::Tensor slopes;      // float32 [Hq], dense
  at::Tensor key_limits;  // float32 [B, Sq]: row i sees the first so many columns, at least 1; undefined: all
  CudnnBias bias;
  CudnnMask mask;
  int64_t offset;
  double scale;
};

/// Why the cuDNN that LibTorch has loaded cannot run these graphs: it is missing, or its version is older than those
/// that the graphs were tried with. Empty where it can.
const std::string& why_no_cudnn_graphs();

/// @return `(out, lse)`: in the layout of q, and float32 `[B, Hq, Sq]`.
std::tuple<at::Tensor, at::Tensor> run_cudnn_forward(const CudnnGraph& call);

/// @param lse  as it was returned; a row with infinity takes no part.
/// @return the gradients of q, k and v. The same bits every time where LibTorch's deterministic algorithms are on.
std::tuple<at::Tensor, at::Tensor, at::Tensor> run_cudnn_backward(
    const CudnnGraph& call,
    const at::Tensor& grad_out,
    const at::Tensor& out,
    const at::Tensor& lse);

}  // namespace posenc::cuda
