#pragma once

#include <ops/dispatch.h>

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <tuple>

// Sizes and integers that are symbols, under torch.compile with dynamic shapes. They cannot be compared with numbers:
// such a call is not checked while it is traced, but by the kernel, which is called with numbers.
namespace posenc::meta {

/// Whether an argument is a symbol, or a tensor with a size that is one.
template <typename T>
bool is_symbol(const T& /*argument*/) {
  return false;
}
inline bool is_symbol(const at::Tensor& tensor) {
  return tensor.defined() && tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}
inline bool is_symbol(const c10::SymInt& value) {
  return value.is_symbolic();
}
template <typename T>
bool is_symbol(const std::optional<T>& argument) {
  return argument.has_value() && is_symbol(*argument);
}

/// Whether one of the arguments is a symbol. Each is an argument of an operator or a struct of them.
template <typename... Arguments>
bool any_symbol(const Arguments&... arguments) {
  return std::apply(
      [](const auto&... members) { return (is_symbol(members) || ...); },
      std::tuple_cat(detail::flattened(arguments)...));
}

/// The number that an integer which is no symbol stands for; other arguments as they are.
template <typename T>
const T& number(const T& argument) {
  return argument;
}
inline int64_t number(const c10::SymInt& value) {
  return value.expect_int();
}
inline std::optional<int64_t> number(const std::optional<c10::SymInt>& value) {
  return value.has_value() ? std::optional<int64_t>(value->expect_int()) : std::nullopt;
}

/// Arguments with numbers in the place of their integers, none of which is a symbol.
template <template <typename> class Arguments>
Arguments<int64_t> numbers(const Arguments<c10::SymInt>& arguments) {
  return std::apply([](const auto&... members) { return Arguments<int64_t>{number(members)...}; }, arguments.flat());
}

/// `check(numbers(arguments))`, unless one of the arguments is a symbol.
template <typename Check, template <typename> class Arguments>
void check_unless_symbolic(const Check& check, const Arguments<c10::SymInt>& arguments) {
  if (!any_symbol(arguments)) {
    check(numbers(arguments));
  }
}

}  // namespace posenc::meta
