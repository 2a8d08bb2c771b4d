#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace posenc {

/// The operator called `name`, such as "posenc::alibi_add". `Signature` is the C++ signature of its schema. Callers
/// keep the result in a static variable: the search by name takes longer than a call.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace posenc
