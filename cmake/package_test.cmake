# Installs the build, then configures, builds and runs the examples as a separate project that uses it.
# Variables: BUILD_DIR, CONSUMER_DIR, WORK_DIR, GENERATOR, Torch_DIR, CUDA_TOOLKIT_ROOT_DIR, CMAKE_CXX_COMPILER,
# CMAKE_CUDA_COMPILER.

set(prefix "${WORK_DIR}/prefix")
set(build "${WORK_DIR}/build")
file(REMOVE_RECURSE "${prefix}" "${build}")

function(run)
  execute_process(COMMAND ${ARGV} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

run("${CMAKE_COMMAND}" --install "${BUILD_DIR}" --prefix "${prefix}")

# The installed CMake files must not contain the path of the build's LibTorch.
file(GLOB_RECURSE files "${prefix}/*.cmake")
cmake_path(GET Torch_DIR PARENT_PATH torch_root)
foreach(file IN LISTS files)
  file(READ "${file}" text)
  string(FIND "${text}" "${torch_root}" found)
  if(NOT found EQUAL -1)
    message(FATAL_ERROR "${file} contains ${torch_root}")
  endif()
endforeach()

set(cuda "")
if(CMAKE_CUDA_COMPILER)
  set(cuda "-DCMAKE_CUDA_COMPILER=${CMAKE_CUDA_COMPILER}" "-DCUDA_TOOLKIT_ROOT_DIR=${CUDA_TOOLKIT_ROOT_DIR}")
endif()
run("${CMAKE_COMMAND}" -S "${CONSUMER_DIR}" -B "${build}" -G "${GENERATOR}" -DCMAKE_BUILD_TYPE=Release
    "-DCMAKE_PREFIX_PATH=${prefix}" "-DTorch_DIR=${Torch_DIR}" "-DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}" ${cuda})
run("${CMAKE_COMMAND}" --build "${build}")
run("${build}/attention")
