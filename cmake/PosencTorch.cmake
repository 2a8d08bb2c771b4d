# Finds LibTorch (target `torch`) by Torch_DIR, CMAKE_PREFIX_PATH or LIBTORCH, else in python3. Sets the C++ standard
# that its headers need.

set(POSENC_TORCH_OLDEST 2.8)   # src/detail/torch_compat.h handles the differences between releases
set(POSENC_TORCH_NEWEST 2.15)  # the newest release that posenc was tested with

if(DEFINED ENV{LIBTORCH})
  list(PREPEND CMAKE_PREFIX_PATH "$ENV{LIBTORCH}")
endif()

# LibTorch reads this list and ignores CMAKE_CUDA_ARCHITECTURES. If the list is unset, LibTorch asks the GPU; without a
# GPU it uses architectures that nvcc 13 no longer supports.
set(TORCH_CUDA_ARCH_LIST "")
foreach(arch IN LISTS POSENC_CUDA_ARCHITECTURES)
  if(NOT arch MATCHES "^([0-9]+)([0-9][af]?)$")
    message(FATAL_ERROR "POSENC_CUDA_ARCHITECTURES: '${arch}'; expected numbers such as 90")
  endif()
  string(APPEND TORCH_CUDA_ARCH_LIST " ${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
endforeach()
string(STRIP "${TORCH_CUDA_ARCH_LIST}" TORCH_CUDA_ARCH_LIST)
string(APPEND TORCH_CUDA_ARCH_LIST "+PTX")

# pip names the python of its environment by Python_EXECUTABLE.
set(torch_python "${Python_EXECUTABLE}")
if(NOT torch_python)
  set(torch_python python3)
endif()
if(NOT Torch_DIR AND NOT DEFINED ENV{Torch_DIR} AND NOT TARGET torch)
  find_file(POSENC_TORCH_CONFIG TorchConfig.cmake PATH_SUFFIXES share/cmake/Torch Torch NO_CACHE)
  if(NOT POSENC_TORCH_CONFIG)
    # Finds the package without importing it, which takes seconds.
    execute_process(
      COMMAND "${torch_python}" -c
              "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
      OUTPUT_VARIABLE torch_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(torch_package)
      list(APPEND CMAKE_PREFIX_PATH "${torch_package}/share/cmake")
    endif()
  endif()
endif()

# LibTorch's package looks for the toolkit only on PATH.
if(NOT DEFINED CUDA_TOOLKIT_ROOT_DIR AND DEFINED ENV{CUDA_HOME})
  set(CUDA_TOOLKIT_ROOT_DIR "$ENV{CUDA_HOME}" CACHE PATH "Folder of the CUDA Toolkit")
  if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER "$ENV{CUDA_HOME}/bin/nvcc")
  endif()
endif()

# Global, because a project that has posenc as a subdirectory links with these targets too.
set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL ON)
find_package(Torch REQUIRED)  # tensors, dispatcher, autograd
unset(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL)
include("${CMAKE_CURRENT_LIST_DIR}/PosencTorchLink.cmake")

string(REGEX MATCH "^[0-9]+\\.[0-9]+" torch_series "${Torch_VERSION}")
if(torch_series VERSION_LESS POSENC_TORCH_OLDEST)
  message(FATAL_ERROR "posenc needs LibTorch ${POSENC_TORCH_OLDEST} or later, found ${Torch_VERSION}: ${Torch_DIR}")
elseif(torch_series VERSION_GREATER POSENC_TORCH_NEWEST)
  message(WARNING "posenc was tried with LibTorch ${POSENC_TORCH_OLDEST} to ${POSENC_TORCH_NEWEST}, found "
                  "${Torch_VERSION}: ${Torch_DIR}")
endif()

# Set again after find_package(Torch), which appends flags for its headers.
if(torch_series VERSION_LESS 2.14)
  set(CMAKE_CUDA_STANDARD 17)
else()
  set(CMAKE_CXX_STANDARD 20)  # headers of 2.14 stop with an error below C++20
  set(CMAKE_CUDA_STANDARD 20)
  if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    # CMake 3.25 does not know that nvcc supports C++20.
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  endif()
endif()

if(POSENC_CUDA AND NOT TARGET torch_cuda)
  message(FATAL_ERROR "This LibTorch is a CPU build (${Torch_DIR}): choose one for CUDA, or set POSENC_CUDA=OFF")
endif()
if(POSENC_CUDA)
  # Reports one error here instead of one per source later.
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE nvcc_architectures)
  string(REGEX MATCHALL "[0-9]+" nvcc_architectures "${nvcc_architectures}")
  foreach(arch IN LISTS POSENC_CUDA_ARCHITECTURES)
    string(REGEX REPLACE "[af]$" "" number "${arch}")
    if(NOT number IN_LIST nvcc_architectures)
      list(JOIN nvcc_architectures ", " nvcc_architectures)
      message(FATAL_ERROR "POSENC_CUDA_ARCHITECTURES: nvcc ${CMAKE_CUDA_COMPILER_VERSION} does not compile for "
                          "${arch}; it knows ${nvcc_architectures}")
    endif()
  endforeach()
endif()
