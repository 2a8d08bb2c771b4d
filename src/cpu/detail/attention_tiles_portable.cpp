#include <cpu/detail/attention_tile_kernels.h>

// For the instruction set of the compiler's flags.
namespace posenc::cpu {

const TileKernels<float>& portable_tile_kernels(float /*tag*/) {
  return TileKernelsOf<float, 16, 6>::kernels;
}

const TileKernels<double>& portable_tile_kernels(double /*tag*/) {
  return TileKernelsOf<double, 16, 6>::kernels;
}

}  // namespace posenc::cpu
