// posenc_bench: compares posenc with LibTorch's tensor operations on this machine. See README.md in this folder.

#include "cases.h"
#include "device.h"
#include "posenc_bench_commit.h"
#include "reporter.h"
#include "suite.h"

#include <posenc/version.h>

#include <benchmark/benchmark.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <memory>
#include <string>
#include <string_view>

namespace {

using namespace posenc::bench;

constexpr std::string_view kProtocolFlag = "--protocol=";

void print_help() {
  std::cout << "posenc_bench [--protocol={kernel|wall}]\n"
               "          kernel (default): device time of the forward call, and of the backward pass with gradients\n"
               "          given, against the copy or fill of as many bytes; then the host's cost per call\n"
               "          wall: wall clock with device synchronisation, the sum of the results and its backward()\n\n";
  benchmark::PrintDefaultHelp();
}

/// Reads `--protocol` and takes it off the command line, which Google Benchmark reads next.
Protocol take_protocol(int& argc, char** argv) {
  Protocol protocol = Protocol::kernel;
  char** const end = std::remove_if(argv + 1, argv + argc, [&](std::string_view argument) {
    if (argument.substr(0, kProtocolFlag.size()) != kProtocolFlag) {
      return false;
    }
    const auto value = argument.substr(kProtocolFlag.size());
    if (value != to_string(Protocol::kernel) && value != to_string(Protocol::wall)) {
      std::cerr << argv[0] << ": error: " << argument << ": expected kernel or wall\n";
      std::exit(EXIT_FAILURE);
    }
    protocol = value == to_string(Protocol::wall) ? Protocol::wall : Protocol::kernel;
    return true;
  });
  *end = nullptr;  // argv ends with a null pointer
  argc = static_cast<int>(end - argv);
  return protocol;
}

/// Whether --benchmark_format is given: Google Benchmark's own reporter then prints to the terminal.
bool has_format_flag(int argc, char** argv) {
  return std::any_of(argv + 1, argv + argc, [](std::string_view argument) {
    constexpr std::string_view kFlag = "--benchmark_format";
    return argument.substr(0, kFlag.size()) == kFlag;
  });
}

std::string protocol_description(Protocol protocol, const Device& device) {
  if (protocol == Protocol::kernel) {
    return device.clock_description() + "; gradients given; median";
  }
  return "wall clock with device synchronisation, backward() of the sum of the results, fresh forward; median";
}

/// Adds device, versions and protocol to the JSON, and returns them as the first lines of the report.
std::string describe_run(Protocol protocol, const Device& device) {
  const std::string versions =
      std::string("posenc ") + posenc::version() + " (" + POSENC_BENCH_COMMIT + "), LibTorch " + TORCH_VERSION;
  const std::string method = std::string(to_string(protocol)) + ": " + protocol_description(protocol, device);
  benchmark::AddCustomContext("device", device.description());
  benchmark::AddCustomContext("versions", versions);
  benchmark::AddCustomContext("protocol", method);
  return device.description() + "  \n" + versions + "  \nProtocol " + method + "\n";
}

int run(int argc, char** argv) {
  const Protocol protocol = take_protocol(argc, argv);
  const bool own_format = has_format_flag(argc, argv);
  benchmark::Initialize(&argc, argv, print_help);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return EXIT_FAILURE;
  }
  const std::unique_ptr<Device> device = make_device();
  Suite suite;
  add_rotary_embedding(suite, *device, protocol);
  add_qk_norm_rotary_embedding(suite, *device, protocol);
  add_learnable_frequencies(suite, *device, protocol);
  add_alibi(suite, *device, protocol);
  add_alibi_attention(suite, *device, protocol);
  if (protocol == Protocol::kernel) {
    keep_freed_memory();
    add_rotary_embedding_forms(suite, *device);
    add_attention_shapes(suite, *device);
    add_host_cost(suite, *device);
  }
  MarkdownReporter reporter(suite, describe_run(protocol, *device));
  const std::size_t count = benchmark::RunSpecifiedBenchmarks(own_format ? nullptr : &reporter);
  benchmark::Shutdown();
  return count > 0 && !reporter.failed() ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << argv[0] << ": error: " << error.what() << "\n";
    return EXIT_FAILURE;
  }
}
