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

/// Prints runs as Markdown: a table per configuration as soon as its cases are done, then the host's costs, then a
/// summary per encoding. What a filter left out is printed as "-".
class MarkdownReporter final : public benchmark::BenchmarkReporter {
 public:
  /// @param suite  what the runs stand for; outlives the reporter.
  /// @param preamble  printed before everything else.
  MarkdownReporter(const Suite& suite, std::string preamble);

  bool ReportContext(const Context& context) override;
  void ReportRuns(const std::vector<Run>& runs) override;
  void Finalize() override;

  /// Whether a case could not be measured.
  bool failed() const { return failed_; }

 private:
  /// A value for each of `Pass`.
  template <typename T>
  using PerPass = std::array<std::optional<T>, 3>;

  /// Measured seconds of the passes of one implementation; the total is their sum where it was not measured itself.
  using Seconds = PerPass<double>;

  struct Configuration {
    std::string encoding;
    std::string label;
    std::string title;
    /// By implementation, in the order of the runs.
    std::vector<std::pair<std::string, Seconds>> measured;
    std::vector<std::pair<std::string, PerPass<double>>> peak_bytes;
    PerPass<double> bytes;
    PerPass<double> operations;
    std::array<bool, 3> trivial{};
  };

  /// Speedups of all configurations of an encoding so far.
  using Speedups = std::array<std::vector<double>, 3>;

  void record(const Case& benchmark_case, double seconds, std::optional<double> peak_bytes);
  void report_configuration();
  void print_table(const Configuration& configuration, const Seconds& libtorch);
  /// Operations a second of each implementation that they were given for.
  void print_operations(const Configuration& configuration);
  /// Peak memory of each implementation that it was measured of.
  void print_memory(const Configuration& configuration);
  /// How many times as long as `yardstick`, a copy or a fill or another, the passes take that it was measured for.
  void print_ratios(const Seconds& posenc, const Seconds& measured, const char* yardstick);
  void report_host_costs();
  void report_summary();

  static Seconds find(const Configuration& configuration, const std::string& implementation);
  /// The formulation with the smallest total, or of what the filter left; its name is empty where none was run.
  static std::pair<std::string, Seconds> fastest_formulation(const Configuration& configuration);

  const Suite& suite_;
  std::string preamble_;
  /// The configuration whose runs are coming in.
  std::optional<Configuration> current_;
  /// Encodings in the order of their first run.
  std::vector<std::pair<std::string, Speedups>> speedups_;
  std::vector<std::pair<HostCall, double>> host_costs_;
  bool failed_ = false;
};

}  // namespace posenc::bench
