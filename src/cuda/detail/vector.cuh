#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// Vector loads and stores, and the arithmetic type of each storage type. No torch.
namespace posenc::cuda {

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];

  __device__ T& operator[](int i) { return values[i]; }
  __device__ const T& operator[](int i) const { return values[i]; }
};

template <int N, typename T>
__device__ Vector<T, N> load(const T* address) {
  return *reinterpret_cast<const Vector<T, N>*>(address);
}

template <int N, typename T>
__device__ void store(T* address, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(address) = vector;
}

/// N elements from `index` on, which are contiguous; N = 1 admits any stride.
template <int N, typename T, typename Index>
__device__ Vector<T, N> load_strided(const T* data, Index index, int64_t stride) {
  if constexpr (N == 1) {
    return {data[index * stride]};
  } else {
    return load<N>(data + index);
  }
}

template <int N, typename T, typename Index>
__device__ void store_strided(T* data, Index index, int64_t stride, const Vector<T, N>& vector) {
  if constexpr (N == 1) {
    data[index * stride] = vector[0];
  } else {
    store<N>(data + index, vector);
  }
}

template <int N, typename T>
__device__ Vector<T, N> splat(T value) {
  Vector<T, N> vector;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    vector[i] = value;
  }
  return vector;
}

/// Keeps the compiler from holding widened elements of a vector past this point. They take twice the registers of
/// packed ones, and spill.
template <typename T, int V>
__device__ void keep_packed(Vector<T, V>& vector) {
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
    auto* const words = reinterpret_cast<uint32_t*>(&vector);
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      asm volatile("" : "+r"(words[i]));
    }
  }
}

/// The arithmetic type of a storage type.
template <typename T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <typename T>
using arithmetic_t = typename Arithmetic<T>::type;

__device__ inline float widen(__half value) {
  return __half2float(value);
}
__device__ inline float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ inline float widen(float value) {
  return value;
}
__device__ inline double widen(double value) {
  return value;
}

/// Rounds to nearest, ties to even.
template <typename T>
__device__ T narrow(arithmetic_t<T> value);
template <>
__device__ inline __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline float narrow<float>(float value) {
  return value;
}
template <>
__device__ inline double narrow<double>(double value) {
  return value;
}

/// Rounds two elements like `narrow`, in one instruction.
__device__ inline void narrow_pair(float a, float b, __half& low, __half& high) {
  const __half2 pair = __floats2half2_rn(a, b);
  low = pair.x;
  high = pair.y;
}
__device__ inline void narrow_pair(float a, float b, __nv_bfloat16& low, __nv_bfloat16& high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  low = pair.x;
  high = pair.y;
}

/// Converts all elements of a vector.
template <typename T, int N>
__device__ Vector<arithmetic_t<T>, N> widen(const Vector<T, N>& vector) {
  Vector<arithmetic_t<T>, N> wide;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    wide[i] = widen(vector[i]);
  }
  return wide;
}

template <typename T, int N>
__device__ Vector<T, N> narrow(const Vector<arithmetic_t<T>, N>& wide) {
  Vector<T, N> vector;
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      narrow_pair(wide[i], wide[i + 1], vector[i], vector[i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      vector[i] = narrow<T>(wide[i]);
    }
  }
  return vector;
}

/// A product that the compiler does not fuse with a sum, and a fused multiply-add that it does not split.
__device__ inline float multiply(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ inline double multiply(double a, double b) {
  return __dmul_rn(a, b);
}
__device__ inline float multiply_add(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
__device__ inline double multiply_add(double a, double b, double c) {
  return __fma_rn(a, b, c);
}

/// 2^x in one instruction, with an error of two units in the last place; subnormal numbers are flushed to zero.
__device__ inline float approximate_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

}  // namespace posenc::cuda
