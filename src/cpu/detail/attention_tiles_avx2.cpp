#include <cpu/detail/attention_tile_kernels.h>

// For x86-64 with AVX2 and FMA: 16 registers of 32 bytes.
namespace posenc::cpu {

const TileKernels<float>& avx2_tile_kernels(float /*tag*/) {
  return TileKernelsOf<float, 32, 6>::kernels;
}

const TileKernels<double>& avx2_tile_kernels(double /*tag*/) {
  return TileKernelsOf<double, 32, 6>::kernels;
}

}  // namespace posenc::cpu
