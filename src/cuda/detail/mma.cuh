#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Instructions of compute capability 8.0 and later for tiles of 16-bit elements: asynchronous copies to shared memory,
// and matrix products of a warp (PTX ISA: "cp.async", "ldmatrix", "mma.m16n8k16"). No torch.
namespace posenc::cuda::mma {

/// Elements of one 16-byte chunk, the unit of copies and of the permutation below.
constexpr int kChunk = 8;

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// The address of chunk `chunk + step` of a row, in a tile at `tile` with rows of D elements. D is a power of two from
/// 64 on, `tile` is a multiple of the bytes of a row, and `chunk` and `step` have no common bit.
///
/// Chunks are permuted within groups of eight, so that the same chunk of eight consecutive rows uses all banks of
/// shared memory. The permutation is an exclusive or: for a constant `step` it is one instruction after the part that
/// loops do not change.
template <int D>
__device__ uint32_t chunk_address(uint32_t tile, int row, int chunk, int step) {
  const auto first = static_cast<uint32_t>(tile + row * D * 2 + (chunk ^ row % 8) * 16);
  return first ^ static_cast<uint32_t>(step * 16);
}

/// Starts to copy 16 bytes to shared memory, or writes zeros if not `valid`.
__device__ inline void start_copy(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

/// Ends a group of copies.
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits for all groups of copies of this thread except the last `Pending` ones.
template <int Pending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

/// Loads four 8 x 8 matrices. Lane i gives the address of row i % 8 of matrix i / 8; it gets elements 2 (i % 4) and
/// 2 (i % 4) + 1 of row i / 4 of each matrix.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

/// The same for the transposed matrices.
__device__ inline void load_transposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

/// `sum += a b` for a `[16, 16]` and b `[16, 8]`. Lane 4 g + t holds columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of rows
/// g and g + 8 of a, rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of column g of b, and columns 2 t and 2 t + 1 of rows g and
/// g + 8 of the sum.
template <typename T>
__device__ void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply<__half>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply<__nv_bfloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Two numbers rounded to T, the first in the low half.
template <typename T>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

}  // namespace posenc::cuda::mma
