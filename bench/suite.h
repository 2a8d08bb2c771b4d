#pragma once

#include "timing.h"

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

// Descriptions of the benchmark's cases, and their registration with Google Benchmark.
namespace posenc::bench {

/// kernel: device time, with the gradients of the outputs given. wall: host time of a training step.
enum class Protocol { kernel, wall };

const char* to_string(Protocol protocol);
const char* to_string(Pass pass);

/// Names of the implementations that are not a LibTorch formulation.
inline constexpr const char* kPosenc = "posenc";
inline constexpr const char* kCopy = "copy";
inline constexpr const char* kFill = "fill";
inline constexpr const char* kWithoutBias = "without_bias";
inline constexpr const char* kBareCudnn = "bare_cudnn";
inline constexpr const char* kPosencWithoutCudnn = "posenc_without_cudnn";
inline constexpr const char* kPosencWithoutSlopes = "posenc_without_slopes";
inline constexpr const char* kPosencOneByOne = "posenc_one_by_one";
inline constexpr const char* kPosencPadded = "posenc_padded";
inline constexpr const char* kPosencAllKeys = "posenc_all_keys";

/// One implementation of one pass of an encoding at one configuration.
struct Case {
  /// Name of the encoding as the tables print it, "RoPE".
  std::string encoding;
  /// The part of the benchmark's name that tells configurations of an encoding apart, "fp16/B1/S2048".
  std::string configuration;
  /// The configuration in words, for the heading of its table.
  std::string title;
  Pass pass;
  /// One of the names above, or the name of a formulation in LibTorch's tensor operations. Tables show the fastest
  /// formulation.
  std::string implementation;
  /// Minimum number of bytes that the pass must read and write; 0 if no rate is printed.
  int64_t bytes;
  /// No implementation runs a kernel in this pass. Times are those of the clock and the host; no speedup is printed.
  bool trivial = false;
  /// Floating point operations of the pass if it is compute-bound, else 0.
  double operations = 0;

  /// Name of the benchmark: `encoding/pass/implementation/configuration`.
  std::string name() const;
};

/// A call whose host time is measured.
struct HostCall {
  std::string id;
  std::string title;

  std::string name() const;
};

/// A row of the host-cost table: cost of the call with id `minuend` minus cost of the call with id `subtrahend`.
struct HostDifference {
  std::string title;
  std::string minuend;
  std::string subtrahend;
};

/// Cases in the order of registration. The cases of one configuration must be registered one after the other.
class Suite {
 public:
  /// Does one measurement. An exception is reported as the error of the case.
  using Body = std::function<Timing()>;

  void add(const Case& benchmark_case, Body body);
  void add(const HostCall& call, Body body);
  void add(const HostDifference& difference);

  /// The case or call registered under a benchmark's name; nullptr if there is none.
  const Case* find_case(const std::string& name) const;
  const HostCall* find_host_call(const std::string& name) const;

  const std::vector<HostDifference>& host_differences() const { return host_differences_; }

 private:
  std::map<std::string, Case> cases_;
  std::map<std::string, HostCall> host_calls_;
  std::vector<HostDifference> host_differences_;
};

}  // namespace posenc::bench
