# The target `torch`, from LibTorch 2.11: named by Torch_DIR, CMAKE_PREFIX_PATH or LIBTORCH, else that of python3.

if(DEFINED ENV{LIBTORCH})
  list(PREPEND CMAKE_PREFIX_PATH "$ENV{LIBTORCH}")
endif()

# LibTorch looks at this list and ignores CMAKE_CUDA_ARCHITECTURES. Unset, it asks the GPU, and without one takes
# a list with architectures that nvcc 13 no longer knows.
set(TORCH_CUDA_ARCH_LIST "")
foreach(arch IN LISTS POSENC_CUDA_ARCHITECTURES)
  if(NOT arch MATCHES "^([0-9]+)([0-9][af]?)$")
    message(FATAL_ERROR "POSENC_CUDA_ARCHITECTURES: '${arch}'; expected numbers such as 90")
  endif()
  string(APPEND TORCH_CUDA_ARCH_LIST " ${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
endforeach()
string(STRIP "${TORCH_CUDA_ARCH_LIST}" TORCH_CUDA_ARCH_LIST)
string(APPEND TORCH_CUDA_ARCH_LIST "+PTX")

if(NOT Torch_DIR AND NOT DEFINED ENV{Torch_DIR} AND NOT TARGET torch)
  find_file(POSENC_TORCH_CONFIG TorchConfig.cmake PATH_SUFFIXES share/cmake/Torch Torch NO_CACHE)
  if(NOT POSENC_TORCH_CONFIG)
    # Where the package lies, without the seconds that importing it takes.
    execute_process(
      COMMAND python3 -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
      OUTPUT_VARIABLE torch_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(torch_package)
      list(APPEND CMAKE_PREFIX_PATH "${torch_package}/share/cmake")
    endif()
  endif()
endif()

find_package(Torch 2.11 REQUIRED)  # tensors, dispatcher, autograd; 2.11: the release this is tested against

# LibTorch appends flags for its own headers to these; the standard it was given must survive.
set(CMAKE_CUDA_STANDARD 17)

if(POSENC_CUDA AND NOT TARGET torch_cuda)
  message(FATAL_ERROR "This LibTorch is a CPU build (${Torch_DIR}): choose one for CUDA 13.0, or set POSENC_CUDA=OFF")
endif()
