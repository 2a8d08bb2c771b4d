#include "suite.h"

#include <benchmark/benchmark.h>
#include <c10/util/Exception.h>

#include <exception>
#include <iostream>
#include <optional>
#include <utility>

namespace posenc::bench {
namespace {

/// Marks the benchmark as failed. The message is also written to standard error, because the field that passes it to
/// reporters has different names in different versions of Google Benchmark.
void skip(benchmark::State& state, const std::string& name, const char* message) {
  std::cerr << name << ": " << message << "\n";
  state.SkipWithError(message);
}

std::optional<Timing> measure_or_skip(benchmark::State& state, const std::string& name, const Suite::Body& body) {
  try {
    return body();
  } catch (const c10::Error& error) {
    skip(state, name, error.what_without_backtrace());
  } catch (const std::exception& error) {
    skip(state, name, error.what());
  }
  return std::nullopt;
}

/// Registers `body` as a benchmark of one iteration whose time is the measured median. `body` does the warm-ups, takes
/// the samples and flushes the caches, not Google Benchmark.
void register_benchmark(const std::string& name, benchmark::TimeUnit unit, Suite::Body body, int64_t bytes) {
  const auto run = [name, body = std::move(body), bytes](benchmark::State& state) {
    const std::optional<Timing> timing = measure_or_skip(state, name, body);
    if (!timing) {
      return;
    }
    for ([[maybe_unused]] auto iteration : state) {
      state.SetIterationTime(timing->median);
    }
    state.counters["median_s"] = timing->median;
    state.counters["min_s"] = timing->minimum;
    state.counters["samples"] = static_cast<double>(timing->samples);
    if (timing->plans) {
      state.counters["plans"] = static_cast<double>(*timing->plans);
    }
    if (timing->peak_bytes) {
      state.counters["peak_bytes"] = static_cast<double>(*timing->peak_bytes);
    }
    if (bytes > 0) {
      state.counters["bytes"] = static_cast<double>(bytes);
      state.counters["GB/s"] = static_cast<double>(bytes) / timing->median * 1e-9;
    }
  };
  benchmark::RegisterBenchmark(name.c_str(), run)->UseManualTime()->Iterations(1)->Unit(unit);
}

}  // namespace

const char* to_string(Protocol protocol) {
  return protocol == Protocol::kernel ? "kernel" : "wall";
}

const char* to_string(Pass pass) {
  switch (pass) {
    case Pass::forward:
      return "forward";
    case Pass::backward:
      return "backward";
    case Pass::total:
      return "total";
  }
  return "";
}

std::string Case::name() const {
  return encoding + "/" + to_string(pass) + "/" + implementation + "/" + configuration;
}

std::string HostCall::name() const {
  return "host/" + id;
}

void Suite::add(const Case& benchmark_case, Body body) {
  const std::string name = benchmark_case.name();
  TORCH_CHECK(cases_.emplace(name, benchmark_case).second, "the benchmark ", name, " is registered twice");
  register_benchmark(name, benchmark::kMillisecond, std::move(body), benchmark_case.bytes);
}

void Suite::add(const HostCall& call, Body body) {
  const std::string name = call.name();
  TORCH_CHECK(host_calls_.emplace(name, call).second, "the benchmark ", name, " is registered twice");
  register_benchmark(name, benchmark::kMicrosecond, std::move(body), /*bytes=*/0);
}

void Suite::add(const HostDifference& difference) {
  host_differences_.push_back(difference);
}

const Case* Suite::find_case(const std::string& name) const {
  const auto found = cases_.find(name);
  return found == cases_.end() ? nullptr : &found->second;
}

const HostCall* Suite::find_host_call(const std::string& name) const {
  const auto found = host_calls_.find(name);
  return found == host_calls_.end() ? nullptr : &found->second;
}

}  // namespace posenc::bench
