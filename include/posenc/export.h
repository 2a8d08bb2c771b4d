#pragma once

// Visibility of the public symbols of libposenc. The library is built with hidden visibility, and exports only
// symbols marked POSENC_API. The build system defines POSENC_BUILDING while compiling the library.

#if defined(_WIN32)
#if defined(POSENC_BUILDING)
#define POSENC_API __declspec(dllexport)
#else
#define POSENC_API __declspec(dllimport)
#endif
#else
#define POSENC_API __attribute__((visibility("default")))
#endif
