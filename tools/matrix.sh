# shellcheck shell=bash
# ./dev matrix: tests the library with every supported release of LibTorch. Sourced by ../dev, whose functions it uses.

# The last patch of each series between torch_oldest and torch_newest.
readonly matrix_releases=(2.8.0 2.9.1 2.10.0 2.11.0 2.12.1 2.13.0 2.14.1 2.15.0)
readonly matrix_folder=build/matrix

# Each row is a file that is written when its release is done, so an interrupted run can be continued.
verb_matrix() {
  local smoke='' releases=() release row failed=0
  while (($# > 0)); do
    case $1 in
      --smoke) smoke=--smoke ;;
      --again) rm -rf "${matrix_folder:?}"/*.row ;;
      -*) die "matrix: unknown argument $1" ;;
      *) releases+=("$1") ;;
    esac
    shift
  done
  ((${#releases[@]} > 0)) || releases=("${matrix_releases[@]}")
  mkdir -p "$matrix_folder"
  for release in "${releases[@]}"; do
    row=$(matrix_row_file "$release" "$smoke")
    if [[ -e $row ]]; then
      say "LibTorch $release: done before, $row; ./dev matrix --again forgets it"
    else
      # In another ./dev, because a ./dev uses one release of LibTorch from its start.
      POSENC_TORCH=$release "$root/dev" matrix-row $smoke || failed=$((failed + 1))
    fi
  done
  printf '%s\n' '| LibTorch | CUDA | Compiler | C++ | Built | Passed | Failed | Skipped | Seconds |' \
    '|---|---|---|---|---|---:|---:|---:|---:|'
  for release in "${releases[@]}"; do
    row=$(matrix_row_file "$release" "$smoke")
    [[ ! -e $row ]] || cat "$row"
  done
  ((failed == 0)) || die "$failed releases were not done; ./dev matrix takes them up again"
  for release in "${releases[@]}"; do
    row=$(matrix_row_file "$release" "$smoke")
    if ! grep -Eq '\| yes \| [1-9][0-9]* \| 0 \|' "$row"; then
      die "LibTorch $release: not built, or tests failed; see build/matrix"
    fi
  done
}

# matrix_row_file RELEASE SMOKE: name of the file of a row, different for each compiler.
matrix_row_file() {
  local compiler
  compiler=$(basename "${CXX:-c++}")
  printf '%s\n' "$matrix_folder/$1$2-$compiler.row"
}

# Builds with the release POSENC_TORCH, runs the CPU tests and writes the row, also if the build or tests fail. If the
# CUDA compiler of the release can be neither found nor installed, the library is built without CUDA kernels, and the
# row says so.
verb_matrix-row() {
  local smoke=${1:-} build built=yes start=$SECONDS targets=() tests=(-LE cuda) row
  find_torch
  cuda_version=$(cuda_of_torch)
  if [[ -n $cuda_version ]] && ! find_toolkit "$cuda_version" && ! cuda_package "$cuda_version" >/dev/null; then
    say "LibTorch $POSENC_TORCH: no nvcc of CUDA $cuda_version, so a build without CUDA kernels"
    export POSENC_CPU=1
  fi
  setup
  build=$matrix_folder/$POSENC_TORCH-$(basename "${CXX:-c++}")
  row=$(matrix_row_file "$POSENC_TORCH" "$smoke")
  if [[ -n $smoke ]]; then
    targets=(--target posenc posenc_alibi_test)
    tests=(-R '^(alibi|python.operators)\.cpu$')
  fi
  configure dev "$build"
  say "Building $build ..."
  cmake --build "$build" ${targets[@]+"${targets[@]}"} >&2 || built=no
  local results=$build/results.xml
  rm -f "$results"
  if [[ $built == yes ]]; then
    # The status of ctest is ignored: the row has the number of failures.
    OMP_NUM_THREADS=1 ctest --test-dir "$build" --no-tests=error --output-junit "$root/$results" \
      "${tests[@]}" >&2 || true
  fi
  matrix_row "$build" "$built" "$results" $((SECONDS - start)) >"$row.new"
  mv "$row"{.new,}
}

# matrix_row BUILD BUILT RESULTS SECONDS: prints the row, from files that CMake and ctest have written.
matrix_row() {
  local compiler standard total failures skipped
  compiler=$(sed -n 's/^set(CMAKE_CXX_COMPILER_\(ID\|VERSION\) "\(.*\)")/\2/p' \
    "$1"/CMakeFiles/*/CMakeCXXCompiler.cmake | paste -sd ' ')
  standard=$(sed -n 's/.*-std=c++\([0-9]*\).*/\1/p' "$1/build.ninja" | sort -n | head -n 1)
  total=$(matrix_count tests "$3") failures=$(matrix_count failures "$3") skipped=$(matrix_count skipped "$3")
  printf '| %s | %s | %s | %s | %s | %s | %s | %s | %s |\n' "$POSENC_TORCH" "$(matrix_cuda)" "$compiler" "$standard" \
    "$2" $((total - failures - skipped)) "$failures" "$skipped" "$4"
}

# The CUDA version that kernels were compiled for.
matrix_cuda() {
  if [[ -z $cuda_version ]]; then
    printf 'none\n'
  elif [[ -n ${POSENC_CPU:-} ]]; then
    printf '%s, kernels not compiled: no nvcc\n' "$cuda_version"
  else
    printf '%s\n' "$cuda_version"
  fi
}

# matrix_count NAME RESULTS: an attribute of the test suite in ctest's JUnit file; 0 if there is none.
matrix_count() {
  local count=''
  [[ ! -e $2 ]] || count=$(sed -n "s/.*[[:space:]]$1=\"\([0-9]*\)\".*/\1/p" "$2" | head -n 1)
  printf '%s\n' "${count:-0}"
}
