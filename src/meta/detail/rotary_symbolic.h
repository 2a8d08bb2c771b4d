#pragma once

#include <contract/rotary_embedding.h>
#include <meta/detail/symbolic.h>

namespace posenc::meta {

inline bool any_symbolic(const contract::Rotated& x) {
  return has_symbolic_sizes(x.tensor);
}

inline bool any_symbolic(const contract::RotaryArguments& arguments) {
  return has_symbolic_sizes(arguments.cos) || has_symbolic_sizes(arguments.sin) ||
      (arguments.positions.has_value() && has_symbolic_sizes(*arguments.positions));
}

}  // namespace posenc::meta
