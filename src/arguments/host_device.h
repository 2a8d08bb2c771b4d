#pragma once

/// Marks functions that are called by CPU code and by CUDA kernels. No torch.
#if defined(__CUDACC__)
#define POSENC_HOST_DEVICE __host__ __device__
#else
#define POSENC_HOST_DEVICE
#endif
