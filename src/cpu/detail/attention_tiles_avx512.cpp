#include <cpu/detail/attention_tile_kernels.h>

// For x86-64 with AVX-512 (F, VL, DQ, BW): 32 registers of 64 bytes.
namespace posenc::cpu {

const TileKernels<float>& avx512_tile_kernels(float /*tag*/) {
  return TileKernelsOf<float, 64, 12>::kernels;
}

const TileKernels<double>& avx512_tile_kernels(double /*tag*/) {
  return TileKernelsOf<double, 64, 12>::kernels;
}

}  // namespace posenc::cpu
