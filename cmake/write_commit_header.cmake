# cmake -DSOURCE_DIR=... -DHEADER=... -P write_commit_header.cmake
# Writes the commit of the checkout; without one, the environment variable POSENC_COMMIT, or else "unknown".

set(commit "")
if(EXISTS "${SOURCE_DIR}/.git")
  execute_process(
    COMMAND git describe --always --dirty --abbrev=12
    WORKING_DIRECTORY "${SOURCE_DIR}"
    OUTPUT_VARIABLE commit
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(NOT commit)
  set(commit "$ENV{POSENC_COMMIT}")
endif()
if(NOT commit)
  set(commit "unknown")
endif()

set(text "#pragma once\n\n#define POSENC_BENCH_COMMIT \"${commit}\"\n")
if(EXISTS "${HEADER}")
  file(READ "${HEADER}" before)
endif()
if(NOT "${before}" STREQUAL "${text}")
  file(WRITE "${HEADER}" "${text}")
endif()
