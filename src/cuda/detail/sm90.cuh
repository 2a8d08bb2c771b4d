#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Instructions of compute capability 9.0 (sm_90a): tensor copies, barriers that count bytes, and matrix products of a
// warpgroup that read shared memory (PTX ISA: "cp.async.bulk.tensor", "mbarrier", "Asynchronous Warpgroup Level Matrix
// Instructions"). No torch.
//
// Tiles are stored in shared memory as panels of 64 channels: contiguous rows of 128 bytes whose 16-byte chunks are
// permuted so that eight rows use all banks (CU_TENSOR_MAP_SWIZZLE_128B).
namespace posenc::cuda::sm90 {

constexpr int kPanelChannels = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kTileAlignment = 1024;

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// The offset of a chunk of eight channels in its panel.
__device__ inline uint32_t swizzled(int row, int chunk) {
  return static_cast<uint32_t>(row * kPanelRowBytes + (chunk ^ row % 8) * 16);
}

// ---------------------------------------------------------------------------------------------------------------------
// Copies

/// Called by one thread before any other use. All threads synchronise afterwards.
__device__ inline void init_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)));
}

/// Called after the last initialisation.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// Called by one thread: announces the number of bytes that copies will write.
__device__ inline void expect_bytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

/// Waits for all bytes of the `round`-th use of a barrier.
__device__ inline void wait_bytes(uint64_t* barrier, int round) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni ready;\n"
      "bra.uni again;\n"
      "ready:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(round % 2)
      : "memory");
}

/// Called by one thread: starts the copy of a panel whose first element has these coordinates. Elements outside of the
/// tensor are zero.
__device__ inline void start_panel(
    uint32_t to,
    const CUtensorMap& tensor,
    int channel,
    int token,
    int head,
    int batch,
    uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(&tensor), "r"(channel), "r"(token), "r"(head), "r"(batch), "r"(shared_address(barrier))
      : "memory");
}

/// Called by threads that have read shared memory, before the barrier after which one thread overwrites it by a copy.
__device__ inline void order_copies_after_reads() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---------------------------------------------------------------------------------------------------------------------
// Matrix products

/// A fragment of 16 rows and 16 channels of a panel. Lane 4 g + t holds channels 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of
/// rows g and g + 8.
__device__ inline void load_rows(uint32_t (&rows)[4], uint32_t panel, int first_row, int channel) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t address = panel + swizzled(first_row + lane % 16, channel / 8 + lane / 16);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(rows[0]), "=r"(rows[1]), "=r"(rows[2]), "=r"(rows[3])
               : "r"(address)
               : "memory");
}

/// Products of 64 rows and 64 others. Each warp has 16 rows; lane 4 g + t holds columns 8 n + 2 t and 8 n + 2 t + 1 of
/// rows g and g + 8.
using Products = float[8][4];

/// The matrix descriptor of 64 rows of a panel from the channel at `address` on: address, stride of 1,024 bytes between
/// groups of eight rows, 128-byte swizzle.
__device__ inline uint64_t describe(uint32_t address) {
  return (address & 0x3ffffU) >> 4 | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#define POSENC_WGMMA(TYPE)                                                                                    \
  asm volatile(                                                                                               \
      "{\n"                                                                                                   \
      ".reg .pred more;\n"                                                                                    \
      "setp.ne.b32 more, %37, 0;\n"                                                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                             \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21," \
      " %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, more, 1, 1, 0;\n"       \
      "}"                                                                                                     \
      : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3]), "+f"(sum[1][0]), "+f"(sum[1][1]), \
        "+f"(sum[1][2]), "+f"(sum[1][3]), "+f"(sum[2][0]), "+f"(sum[2][1]), "+f"(sum[2][2]), "+f"(sum[2][3]), \
        "+f"(sum[3][0]), "+f"(sum[3][1]), "+f"(sum[3][2]), "+f"(sum[3][3]), "+f"(sum[4][0]), "+f"(sum[4][1]), \
        "+f"(sum[4][2]), "+f"(sum[4][3]), "+f"(sum[5][0]), "+f"(sum[5][1]), "+f"(sum[5][2]), "+f"(sum[5][3]), \
        "+f"(sum[6][0]), "+f"(sum[6][1]), "+f"(sum[6][2]), "+f"(sum[6][3]), "+f"(sum[7][0]), "+f"(sum[7][1]), \
        "+f"(sum[7][2]), "+f"(sum[7][3])                                                                      \
      : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "l"(others), "r"(more))

/// `sum = (more ? sum : 0) + rows others^T` for 16 channels.
__device__ inline void multiply(__half /*type*/, Products& sum, const uint32_t (&rows)[4], uint64_t others, int more) {
  POSENC_WGMMA("f16");
}
__device__ inline void multiply(
    __nv_bfloat16 /*type*/,
    Products& sum,
    const uint32_t (&rows)[4],
    uint64_t others,
    int more) {
  POSENC_WGMMA("bf16");
}
#undef POSENC_WGMMA

/// Keeps the compiler from moving accesses to products across the start or the end of their computation.
__device__ inline void pin(Products& products) {
#pragma unroll
  for (auto& some : products) {
#pragma unroll
    for (float& product : some) {
      asm volatile("" : "+f"(product)::"memory");
    }
  }
}

/// Starts `products = rows tile^T` over `16 Steps` channels, for four warps with 16 rows each. `tile` consists of
/// panels of 64 rows.
template <typename T, int Steps>
__device__ void start_products(Products& products, const uint32_t (&rows)[Steps][4], uint32_t tile) {
  pin(products);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int step = 0; step < Steps; ++step) {
    const uint32_t panel = tile + step / 4 * 64 * kPanelRowBytes;
    multiply(T(), products, rows[step], describe(panel + step % 4 * 32), step);
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits for all products except the last `Pending` ones that were started.
template <int Pending>
__device__ void finish_products(Products& products) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  pin(products);
}

}  // namespace posenc::cuda::sm90
