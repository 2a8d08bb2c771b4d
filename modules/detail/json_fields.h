#pragma once

#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

/// Typed access to the fields of a configuration file. Errors name the field, what was expected and what came.
namespace posenc::detail {

using Json = nlohmann::json;

template <typename... Parts>
[[noreturn]] void fail_hf_config(const Parts&... parts) {
  TORCH_CHECK(false, "posenc::RotaryEmbeddingOptions::from_hf_config: ", parts...);
}

inline std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) {
    text += (text.empty() ? "" : ", ") + word;
  }
  return text;
}

/// The first of `values` that has a value.
template <typename T>
std::optional<T> first_of(std::initializer_list<std::optional<T>> values) {
  const auto found = std::find_if(values.begin(), values.end(), [](const auto& value) { return value.has_value(); });
  return found == values.end() ? std::nullopt : *found;
}

/// An object whose fields are absent, null (treated as absent) or of the requested type. The JSON object must outlive
/// this one.
class Fields {
 public:
  /// @param name  name of the object in messages.
  Fields(const Json& object, std::string name) : object_(&object), name_(std::move(name)) {
    if (!object.is_object()) {
      fail_hf_config("expected ", name_, " to be an object, got ", object.type_name());
    }
  }

  const Json& json() const { return *object_; }
  const std::string& name() const { return name_; }

  bool has(const std::string& key) const { return find(key) != nullptr; }

  /// The value of `key`, or nullptr if it is absent or null.
  const Json* find(const std::string& key) const {
    const auto found = object_->find(key);
    return found == object_->end() || found->is_null() ? nullptr : &*found;
  }

  std::optional<double> number(const std::string& key) const { return get<double>(key, "a number", is_number); }

  /// Accepts 16384.0 as an integer, which some files contain.
  std::optional<int64_t> integer(const std::string& key) const { return get<int64_t>(key, "an integer", is_integer); }

  std::optional<bool> boolean(const std::string& key) const {
    return get<bool>(key, "true or false", [](const Json& value) { return value.is_boolean(); });
  }

  std::optional<std::string> string(const std::string& key) const {
    return get<std::string>(key, "a string", [](const Json& value) { return value.is_string(); });
  }

  std::optional<std::vector<double>> numbers(const std::string& key) const {
    return list<double>(key, "a list of numbers", is_number);
  }

  std::optional<std::vector<int64_t>> integers(const std::string& key) const {
    return list<int64_t>(key, "a list of integers", is_integer);
  }

  std::optional<std::vector<std::string>> strings(const std::string& key) const {
    return list<std::string>(key, "a list of strings", [](const Json& value) { return value.is_string(); });
  }

  std::optional<Fields> object(const std::string& key) const {
    const Json* value = find(key);
    return value == nullptr ? std::nullopt : std::optional(Fields(*value, key));
  }

  /// The value that `get(key)` returned. @throws c10::Error  naming `key` and `purpose` if there is none.
  template <typename T>
  T required(const std::optional<T>& value, const std::string& key, const std::string& purpose) const {
    if (!value) {
      fail_hf_config("expected ", key, " in ", name_, " for ", purpose, ", got none");
    }
    return *value;
  }

 private:
  static bool is_number(const Json& value) { return value.is_number(); }

  static bool is_integer(const Json& value) {
    constexpr double kMost = 9007199254740992.0;  // 2^53: all integers up to it are exact in a double
    return value.is_number_integer() ||
        (value.is_number() && std::abs(value.get<double>()) <= kMost &&
         std::floor(value.get<double>()) == value.get<double>());
  }

  template <typename T, typename Is>
  std::optional<T> get(const std::string& key, const char* expected, const Is& is) const {
    const Json* value = find(key);
    if (value == nullptr) {
      return std::nullopt;
    }
    if (!is(*value)) {
      fail_hf_config("expected ", key, " in ", name_, " to be ", expected, ", got ", value->dump());
    }
    return value->get<T>();
  }

  template <typename T, typename Is>
  std::optional<std::vector<T>> list(const std::string& key, const char* expected, const Is& is) const {
    return get<std::vector<T>>(key, expected, [&](const Json& value) {
      return value.is_array() && std::all_of(value.begin(), value.end(), is);
    });
  }

  const Json* object_;
  std::string name_;
};

}  // namespace posenc::detail
