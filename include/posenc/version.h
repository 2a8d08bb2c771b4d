#pragma once

#include <posenc/export.h>

// The only definition of the version. CMake and pyproject.toml read it from here.
#define POSENC_VERSION_MAJOR 0
#define POSENC_VERSION_MINOR 1
#define POSENC_VERSION_PATCH 0

namespace posenc {

/// Version of the loaded library as "major.minor.patch". It differs from the macros above if a program runs with
/// another libposenc than the one it was compiled with.
POSENC_API const char* version();

}  // namespace posenc
