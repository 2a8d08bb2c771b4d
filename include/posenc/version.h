#pragma once

#include <posenc/export.h>

// The one place where the version is written; CMake reads it from here.
#define POSENC_VERSION_MAJOR 0
#define POSENC_VERSION_MINOR 1
#define POSENC_VERSION_PATCH 0

namespace posenc {

/// Version of the loaded library as "major.minor.patch". It differs from the macros above when a program
/// runs with another libposenc than it was compiled against.
POSENC_API const char* version();

}  // namespace posenc
