#include <cpu/detail/attention_tiles.h>

namespace posenc::cpu {

#ifdef POSENC_X86_64_TILES

bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}

#endif

template <typename Real>
const TileKernels<Real>& tile_kernels() {
#ifdef POSENC_X86_64_TILES
  if (has_avx512()) {
    return avx512_tile_kernels(Real());
  }
  if (has_avx2()) {
    return avx2_tile_kernels(Real());
  }
#endif
  return portable_tile_kernels(Real());
}

template const TileKernels<float>& tile_kernels<float>();
template const TileKernels<double>& tile_kernels<double>();

}  // namespace posenc::cpu
