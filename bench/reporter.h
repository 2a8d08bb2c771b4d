#pragma once

#include "suite.h"

#include <benchmark/benchmark.h>

#include <array>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace posenc::bench {

/// Prints runs as Markdown: a table per configuration as soon as its cases are done, then the host's costs per call,
/// then a summary per encoding. Cases that a filter excluded are printed as "-".
class MarkdownReporter final : public benchmark::BenchmarkReporter {
 public:
  /// @param suite  describes the cases; must outlive the reporter.
  /// @param preamble  printed before everything else.
  MarkdownReporter(const Suite& suite, std::string preamble);

  bool ReportContext(const Context& context) override;
  void ReportRuns(const std::vector<Run>& runs) override;
  void Finalize() override;

  /// Whether the measurement of any case failed.
  bool failed() const { return failed_; }

 private:
  /// An optional value for each `Pass`.
  template <typename T>
  using PerPass = std::array<std::optional<T>, 3>;

  /// Seconds of each pass of one implementation. `find` sets a total that was not measured to forward + backward.
  using Seconds = PerPass<double>;

  struct Configuration {
    std::string encoding;
    std::string label;
    std::string title;
    /// Seconds by implementation, in the order of the runs.
    std::vector<std::pair<std::string, Seconds>> measured;
    std::vector<std::pair<std::string, PerPass<double>>> peak_bytes;
    std::vector<std::pair<std::string, int64_t>> plans;
    PerPass<double> bytes;
    PerPass<double> operations;
    std::array<bool, 3> trivial{};
  };

  /// For each `Pass`, speedups of the configurations of one encoding that were reported so far.
  using Speedups = std::array<std::vector<double>, 3>;

  void record(const Case& benchmark_case, double seconds, std::optional<double> peak_bytes);
  void report_configuration();
  void print_table(const Configuration& configuration, const Seconds& libtorch);
  /// Prints TFLOP/s of each implementation, if its cases have a number of operations.
  void print_operations(const Configuration& configuration);
  /// Prints the peak memory and the number of plans of the implementations for which they were measured.
  void print_memory(const Configuration& configuration);
  /// Prints `seconds`, the time of `subject`, divided by `measured`, the time of `yardstick` (such as a copy), for each
  /// pass with both.
  void print_ratios(
      const Seconds& seconds,
      const Seconds& measured,
      const char* yardstick,
      const char* subject = "posenc");
  void report_host_costs();
  void report_summary();

  static Seconds find(const Configuration& configuration, const std::string& implementation);
  /// Name and times of the formulation with the smallest total (or sum of the passes that a filter left). The name is
  /// empty if none was run.
  static std::pair<std::string, Seconds> fastest_formulation(const Configuration& configuration);

  const Suite& suite_;
  std::string preamble_;
  /// The configuration whose runs are being collected.
  std::optional<Configuration> current_;
  /// Encodings in the order of their first run.
  std::vector<std::pair<std::string, Speedups>> speedups_;
  std::vector<std::pair<HostCall, double>> host_costs_;
  bool failed_ = false;
};

}  // namespace posenc::bench
