#pragma once

// POSENC_CPU_CLONES compiles a function once for each x86-64 level and picks one when the library is loaded, so
// that a portable build still uses AVX-512 or AVX2. Loops of such a function are written for the compiler's
// vectoriser; functions that they call must be inline. There are no clones under sanitizers, whose runtime is not yet
// initialised when the version is picked.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(POSENC_NO_CPU_CLONES)
#define POSENC_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define POSENC_CPU_CLONES
#endif

/// Marks functions that are inlined into each version of such a function.
#if defined(__GNUC__)
#define POSENC_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define POSENC_ALWAYS_INLINE inline
#endif

#if defined(__GNUC__) && !defined(__clang__)
/// States that the iterations of the next loop access different elements.
#define POSENC_INDEPENDENT _Pragma("GCC ivdep")
#else
#define POSENC_INDEPENDENT
#endif
