#pragma once

#include <cuda/detail/cudnn_graph.h>
#include <posenc/export.h>

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <string>

// cuDNN silently returns wrong results for some graphs, and which ones depends on the GPU and on the version of cuDNN.
// A form of graph is therefore used only on a pair of GPU architecture and cuDNN version that the tests have run on, or
// after it has computed a small problem right in this process.
namespace posenc::cuda {

/// A kind of graph. Graphs of one form differ in sizes, strides and scale.
struct CudnnForm {
  at::ScalarType dtype;
  int64_t head_dim;
  CudnnBias bias;
  CudnnMask mask;
  bool offset;                       // whether the position of query 0 is not 0
  bool key_limits;                   // whether rows have limits of keys
  bool grouped;                      // fewer key heads than query heads
  bool deterministic;                // LibTorch's deterministic algorithms
  bool limits_of_sequences = false;  // one limit for each sequence, which the library does not use
};

/// Computes a random problem of two sequences of about 200 tokens by cuDNN and by matrix products in float32, both
/// passes, and waits for the device.
/// @return how the results differ or why cuDNN refuses the form; empty if its results are right.
POSENC_API std::string why_wrong(const CudnnForm& form);

/// The reason why a form is not used on the current device; empty if it is. The first use of a form on a GPU
/// architecture calls `why_wrong`, once per process, and logs the result at level info. No form is tried while a CUDA
/// graph is captured, and none on a pair that the tests have run on unless POSENC_VALIDATE_CUDNN=1 is in the
/// environment at the first use.
std::string why_not_used(const CudnnForm& form);

}  // namespace posenc::cuda
