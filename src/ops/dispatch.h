#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cstddef>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

// Operators whose arguments are structs. The dispatcher knows no structs: a schema lists their members.
//
// An implementation is a function `Result f(const Options&, Inputs...)`. Its schema lists the inputs, if there are any,
// then the members of the options. Inputs and results may be structs as well. A struct has a function `flat`, which
// returns a `std::tuple` of references to its members in the order of the schema, and can be initialised with them in
// this order.
namespace posenc {

/// The operator called `name`, such as "posenc::alibi_add". `Signature` is the C++ signature of its schema. Callers
/// keep the result in a static variable: the search by name takes longer than a call.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

/// Defines the operator of a schema. torch.compile can trace all operators of the library.
inline void define(torch::Library& m, const std::string& schema) {
  m.def(schema.c_str(), {at::Tag::pt2_compliant_tag});
}

namespace detail {

template <typename T, typename = void>
constexpr bool kIsStruct = false;
template <typename T>
constexpr bool kIsStruct<T, std::void_t<decltype(std::declval<std::decay_t<T>&>().flat())>> = true;

/// The parameter type of a member of a struct. The dispatcher recognises a SymInt only in a parameter by value.
template <typename T>
using Parameter = std::conditional_t<
    std::is_same_v<T, at::Tensor> || std::is_same_v<T, std::optional<at::Tensor>> || std::is_same_v<T, std::string>,
    const T&,
    T>;

/// The parameter types of an argument of type `T` in a schema, as a tuple.
template <typename T, bool kStruct = kIsStruct<T>>
struct ParametersOf {
  using type = std::tuple<T>;
};
template <typename T>
struct ParametersOf<T, true> {
  template <typename... Members>
  static std::tuple<Parameter<std::decay_t<Members>>...> parameters(std::tuple<Members...>);
  using type = decltype(parameters(std::declval<std::decay_t<T>&>().flat()));
};
template <typename T>
using Parameters = typename ParametersOf<T>::type;

/// References to the members of a struct, or to an argument that is no struct.
template <typename T>
auto flattened(T& argument) {
  if constexpr (kIsStruct<T>) {
    return argument.flat();
  } else {
    return std::tie(argument);
  }
}

/// The argument of type `T` whose parameters begin at `kBegin` of `parameters`, a tuple of references.
template <typename T, size_t kBegin, typename Tuple, size_t... kIndices>
T argument(const Tuple& parameters, std::index_sequence<kIndices...> /*of the members*/) {
  if constexpr (kIsStruct<T>) {
    return T{std::get<kBegin + kIndices>(parameters)...};
  } else {
    return static_cast<T&&>(std::get<kBegin>(parameters));
  }
}

template <auto kFunction, typename Result, typename Options, typename All, typename... Inputs>
struct KernelOf;

template <auto kFunction, typename Result, typename Options, typename... All, typename... Inputs>
struct KernelOf<kFunction, Result, Options, std::tuple<All...>, Inputs...> {
  static auto call(All... parameters) {
    return invoke(std::forward_as_tuple(parameters...), std::index_sequence_for<Inputs...>());
  }

 private:
  template <typename T>
  using Members = std::make_index_sequence<std::tuple_size_v<Parameters<T>>>;

  /// The number of parameters before those of input `input`.
  static constexpr size_t begin(size_t input) {
    const size_t sizes[] = {size_t{0}, std::tuple_size_v<Parameters<Inputs>>...};
    size_t result = 0;
    for (size_t i = 0; i < input; ++i) {
      result += sizes[i + 1];
    }
    return result;
  }

  template <typename Tuple, size_t... kInputs>
  static auto invoke(const Tuple& all, std::index_sequence<kInputs...> /*inputs*/) {
    const auto function = [&all]() -> Result {
      return kFunction(
          argument<Options, begin(sizeof...(Inputs))>(all, Members<Options>()),
          argument<std::conditional_t<kIsStruct<Inputs>, std::decay_t<Inputs>, Inputs>, begin(kInputs)>(
              all, Members<Inputs>())...);
    };
    if constexpr (kIsStruct<Result>) {
      Result result = function();
      return std::apply([](auto&... members) { return std::tuple(std::move(members)...); }, result.flat());
    } else {
      return function();
    }
  }
};

}  // namespace detail

/// `call` is the implementation `kFunction` with the C++ signature of its schema: what `torch::Library::impl` takes.
template <auto kFunction>
struct Kernel;

template <typename R, typename Options, typename... Inputs, R (*kFunction)(const Options&, Inputs...)>
struct Kernel<kFunction> : detail::KernelOf<
                               kFunction,
                               R,
                               Options,
                               decltype(std::tuple_cat(
                                   std::declval<detail::Parameters<Inputs>>()...,
                                   std::declval<detail::Parameters<Options>>())),
                               Inputs...> {
  using Result = R;
};

template <auto kFunction>
constexpr auto kernel = &Kernel<kFunction>::call;

/// Calls the operator `name`, whose implementations have the type of `kFunction`.
template <auto kFunction, typename Options, typename... Inputs>
auto call_operator(const char* name, const Options& options, Inputs&... inputs) {
  using Result = typename Kernel<kFunction>::Result;
  static const auto op = find_operator<std::remove_pointer_t<decltype(&Kernel<kFunction>::call)>>(name);
  const auto call = [](auto&... members) { return op.call(members...); };
  const auto arguments = std::tuple_cat(detail::flattened(inputs)..., options.flat());
  if constexpr (detail::kIsStruct<Result>) {
    return std::apply([](auto&&... members) { return Result{std::move(members)...}; }, std::apply(call, arguments));
  } else {
    return std::apply(call, arguments);
  }
}

}  // namespace posenc
