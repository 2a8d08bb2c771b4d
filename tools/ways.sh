# shellcheck shell=bash
# ./dev ways: builds the examples with posenc from sources, and with posenc installed by pip. Sourced by ../dev, whose
# functions it uses. The ctest `package` tests `cmake --install`.
#
# The library is built without CUDA kernels, because finding it does not depend on them.

readonly ways_folder=build/ways
readonly scikit_build_core_version=1.1.2 # build backend in pyproject.toml; the tested release

verb_ways() {
  local way ways=("$@")
  ((${#ways[@]} > 0)) || ways=(subdirectory fetch pip)
  for way in "${ways[@]}"; do
    case $way in
      subdirectory | fetch | pip) ;;
      *) die "ways: unknown way $way" ;;
    esac
  done
  export POSENC_CPU=1
  setup
  for way in "${ways[@]}"; do
    rm -rf "${ways_folder:?}/$way"
    mkdir -p "$ways_folder/$way"
    case $way in
      pip) way_pip "$root/$ways_folder/pip" ;;
      *) way_consumer "$way" "$ways_folder/$way" -DPOSENC_CUDA=OFF "-DPOSENC_FROM=$way" ;;
    esac
    say "$way: the example was built and ran, LibTorch $torch_dir"
  done
}

# way_consumer NAME FOLDER ARGUMENT...: configures, builds and runs the examples.
way_consumer() {
  local name=$1 folder=$2 arguments
  shift 2
  arguments=("-DTorch_DIR=$torch_dir" -DCMAKE_BUILD_TYPE=Release "$@")
  if [[ -n $toolkit ]]; then
    arguments+=("-DCMAKE_CUDA_COMPILER=$toolkit/bin/nvcc" "-DCUDA_TOOLKIT_ROOT_DIR=$toolkit"
      "-DCUDAToolkit_ROOT=$toolkit")
  fi
  step "$name: configuring the examples" cmake -G Ninja -S examples -B "$folder/build" "${arguments[@]}"
  step "$name: building them" cmake --build "$folder/build" --target attention
  step "$name: running them" "$folder/build/attention"
}

# way_pip FOLDER: installs posenc by pip into a new environment, which sees the torch that was found.
way_pip() {
  local folder=$1 python cmake_dir
  local package
  package=$(cd "$torch_dir/../../.." && pwd)
  python=$(torch_python) || die "ways: no python has the torch of $torch_dir, which pip needs"
  step "pip: creating an environment" "$python" -m venv "$folder/venv"
  python=$folder/venv/bin/python
  printf '%s\n' "$(dirname "$package")" \
    >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
  step "pip: installing scikit-build-core" "$python" -m pip install --disable-pip-version-check \
    "scikit-build-core==$scikit_build_core_version"
  CUDA_HOME=$toolkit step "pip: pip install ." "$python" -m pip install --disable-pip-version-check \
    --no-build-isolation --no-deps --config-settings=cmake.define.POSENC_CUDA=OFF .
  cmake_dir=$(cd / && "$python" -m posenc --cmake-dir)
  step "pip: import posenc" env -C "$folder" "$python" "$root/tests/python/package_test.py"
  way_consumer pip "$folder" "-Dposenc_DIR=$cmake_dir"
}

# The python whose torch is at torch_dir.
torch_python() {
  local python
  for python in "$torch_dir/../../../../../../../bin/python" python3; do
    if command -v "$python" >/dev/null && [[ $("$python" -c \
      "import importlib.util as u, os; print(os.path.realpath(u.find_spec('torch').submodule_search_locations[0]))" \
      2>/dev/null) == "$(cd "$torch_dir/../../.." && pwd -P)" ]]; then
      printf '%s\n' "$python"
      return
    fi
  done
  return 1
}
