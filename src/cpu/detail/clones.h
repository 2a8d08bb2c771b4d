#pragma once

// POSENC_CPU_CLONES compiles a function once for each x86-64 level and picks one when the library is loaded, so
// that a portable build still uses AVX-512 or AVX2. Loops of such a function are written for the compiler's
// vectoriser; what they call must be inline. Sanitizers cannot run the pickers, which come before their own start.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(POSENC_NO_CPU_CLONES)
#define POSENC_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define POSENC_CPU_CLONES
#endif

/// What such a function calls in a loop becomes part of each of its versions.
#if defined(__GNUC__)
#define POSENC_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define POSENC_ALWAYS_INLINE inline
#endif

#if defined(__GNUC__) && !defined(__clang__)
/// The iterations of the next loop touch different elements.
#define POSENC_INDEPENDENT _Pragma("GCC ivdep")
#else
#define POSENC_INDEPENDENT
#endif
