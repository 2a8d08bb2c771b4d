#pragma once

/// Marks what both the CPU and the CUDA kernels call. No torch.
#if defined(__CUDACC__)
#define POSENC_HOST_DEVICE __host__ __device__
#else
#define POSENC_HOST_DEVICE
#endif
