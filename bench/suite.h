#pragma once

#include "timing.h"

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

// The cases of the benchmark: what each one stands for, and its registration with Google Benchmark.
namespace posenc::bench {

/// kernel: time of the device's work alone, gradients given. wall: what a training loop waits for.
enum class Protocol { kernel, wall };

const char* to_string(Protocol protocol);
const char* to_string(Pass pass);

/// Names of the implementations that are not a LibTorch formulation.
inline constexpr const char* kPosenc = "posenc";
inline constexpr const char* kCopy = "copy";
inline constexpr const char* kFill = "fill";
inline constexpr const char* kWithoutBias = "without_bias";
inline constexpr const char* kBareCudnn = "bare_cudnn";

/// One implementation of one pass of an encoding at one configuration.
struct Case {
  /// Name of the encoding as the tables print it, "RoPE".
  std::string encoding;
  /// The part of the benchmark's name that tells configurations of an encoding apart, "fp16/B1/S2048".
  std::string configuration;
  /// The configuration in words, for the heading of its table.
  std::string title;
  Pass pass;
  /// One of the names above, or that of a formulation in LibTorch's tensor operations; of these the tables show the
  /// fastest.
  std::string implementation;
  /// Fewest bytes that any implementation of the pass must read and write; 0 where a rate would say nothing.
  int64_t bytes;
  /// Nothing is computed in this pass, by nobody: what is measured is the clock and the host, and no ratio is made of
  /// it.
  bool trivial = false;
  /// Floating point operations of the pass, where they are what limits it; else 0.
  double operations = 0;

  /// Name of the benchmark: `encoding/pass/implementation/configuration`.
  std::string name() const;
};

/// A call whose cost to the host is measured.
struct HostCall {
  std::string id;
  std::string title;

  std::string name() const;
};

/// A line of the host-cost table that subtracts one call's cost from another's; both are ids.
struct HostDifference {
  std::string title;
  std::string minuend;
  std::string subtrahend;
};

/// Cases in the order of their registration; those of one configuration are registered one after the other.
class Suite {
 public:
  /// Does one measurement; what it throws is reported as the case's error.
  using Body = std::function<Timing()>;

  void add(const Case& benchmark_case, Body body);
  void add(const HostCall& call, Body body);
  void add(const HostDifference& difference);

  /// The case or call registered under a benchmark's name, null where there is none.
  const Case* find_case(const std::string& name) const;
  const HostCall* find_host_call(const std::string& name) const;

  const std::vector<HostDifference>& host_differences() const { return host_differences_; }

 private:
  std::map<std::string, Case> cases_;
  std::map<std::string, HostCall> host_calls_;
  std::vector<HostDifference> host_differences_;
};

}  // namespace posenc::bench
