# Language level, warnings, sanitizers and the compiler cache.

# C++17 for C++ and CUDA, set before find_package(Torch) enables CUDA. PosencTorch.cmake sets C++20 if LibTorch needs
# it.
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

if(PROJECT_IS_TOP_LEVEL)
  set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
  find_program(CCACHE_PROGRAM ccache)
  mark_as_advanced(CCACHE_PROGRAM)
  foreach(language CXX CUDA)
    if(CCACHE_PROGRAM AND NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
      # Without this ccache skips sources with a precompiled header, because it cannot see which macros the header uses.
      set(CMAKE_${language}_COMPILER_LAUNCHER "${CMAKE_COMMAND}" -E env CCACHE_SLOPPINESS=pch_defines,time_macros
                                              "${CCACHE_PROGRAM}")
    endif()
  endforeach()
endif()

# Warnings for this repository's code. Headers of LibTorch are system headers, without warnings.
function(posenc_warnings target)
  set(cxx -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Woverloaded-virtual -Wextra-semi -Wcast-align)
  # No -Wpedantic and no -Wshadow for CUDA: code that nvcc generates around kernels has such warnings.
  set(cuda -Xcompiler=-Wall,-Wextra)
  if(POSENC_WERROR)
    list(APPEND cxx -Werror)
    list(APPEND cuda -Xcompiler=-Werror -Werror=cross-execution-space-call,reorder,deprecated-declarations)
  endif()
  target_compile_options(${target} PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:${cxx}>" "$<$<COMPILE_LANGUAGE:CUDA>:${cuda}>")
endfunction()

if(POSENC_SANITIZE STREQUAL "address")
  set(sanitize -fsanitize=address)
elseif(POSENC_SANITIZE STREQUAL "undefined")
  # Without vptr: it needs type information that LibTorch does not export.
  set(sanitize -fsanitize=undefined -fno-sanitize=vptr -fno-sanitize-recover=all)
elseif(POSENC_SANITIZE STREQUAL "thread")
  # -Wno-tsan: GCC warns that ThreadSanitizer does not support the fences in LibTorch's headers.
  set(sanitize -fsanitize=thread $<$<CXX_COMPILER_ID:GNU>:-Wno-tsan>)
elseif(POSENC_SANITIZE)
  message(FATAL_ERROR "POSENC_SANITIZE is '${POSENC_SANITIZE}'; expected empty, address, undefined or thread")
endif()
if(POSENC_SANITIZE)
  if(POSENC_CUDA)
    message(FATAL_ERROR "POSENC_SANITIZE needs POSENC_CUDA=OFF; compute-sanitizer is the tool for CUDA code")
  endif()
  # With the checks GCC wrongly reports members of std::optional as uninitialised.
  add_compile_options(${sanitize} -fno-omit-frame-pointer $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
  add_link_options(${sanitize})
endif()
