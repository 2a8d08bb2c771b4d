#include <posenc/version.h>

#define POSENC_STRINGIFY_VALUE(x) #x
#define POSENC_STRINGIFY(x) POSENC_STRINGIFY_VALUE(x)

namespace posenc {

const char* version() {
  return POSENC_STRINGIFY(POSENC_VERSION_MAJOR) "." POSENC_STRINGIFY(POSENC_VERSION_MINOR) "." POSENC_STRINGIFY(
      POSENC_VERSION_PATCH);
}

}  // namespace posenc
