#include "reporter.h"

#include "timing.h"

#include <algorithm>
#include <iomanip>
#include <numeric>
#include <ostream>
#include <sstream>

namespace posenc::bench {
namespace {

constexpr std::array<Pass, 3> kPasses{Pass::forward, Pass::backward, Pass::total};

std::size_t index(Pass pass) {
  return static_cast<std::size_t>(pass);
}

const char* row_title(Pass pass) {
  constexpr std::array<const char*, 3> kTitles{"Forward", "Backward", "Total"};
  return kTitles[index(pass)];
}

bool is_formulation(const std::string& implementation) {
  const std::array<const char*, 10> others{kPosenc,
                                           kCopy,
                                           kFill,
                                           kWithoutBias,
                                           kBareCudnn,
                                           kPosencWithoutCudnn,
                                           kPosencWithoutSlopes,
                                           kPosencOneByOne,
                                           kPosencPadded,
                                           kPosencAllKeys};
  return std::find(others.begin(), others.end(), implementation) == others.end();
}

std::string fixed(double value, int decimals) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(decimals) << value;
  return text.str();
}

std::string fixed(const std::optional<double>& value, int decimals, const char* unit = "") {
  return value ? fixed(*value, decimals) + unit : "-";
}

/// About four significant digits: kernels take microseconds, eager code on a CPU up to a second.
std::string milliseconds(const std::optional<double>& seconds) {
  if (!seconds) {
    return "-";
  }
  const double value = *seconds * 1e3;
  return fixed(value, value < 1 ? 4 : value < 10 ? 3 : value < 100 ? 2 : 1);
}

std::optional<double> quotient(const std::optional<double>& numerator, const std::optional<double>& denominator) {
  return numerator && denominator ? std::optional(*numerator / *denominator) : std::nullopt;
}

/// The entry of `key`, which is appended if it is missing. The list keeps the order of insertion.
template <typename T>
T& entry(std::vector<std::pair<std::string, T>>& list, const std::string& key) {
  const auto found = std::find_if(list.begin(), list.end(), [&](const auto& item) { return item.first == key; });
  return found != list.end() ? found->second : list.emplace_back(key, T{}).second;
}

std::optional<double> sum_of_passes(const std::array<std::optional<double>, 3>& values) {
  const auto& forward = values[index(Pass::forward)];
  const auto& backward = values[index(Pass::backward)];
  return forward && backward ? std::optional(*forward + *backward) : std::nullopt;
}

void print_row(std::ostream& out, const std::vector<std::string>& cells) {
  for (const auto& cell : cells) {
    out << "| " << cell << " ";
  }
  out << "|\n";
}

/// Median of the counter `name` over the runs of a case, which are several with --benchmark_repetitions. With
/// --benchmark_*_aggregates_only it is Google Benchmark's own median. nullopt if the case failed.
std::optional<double> median_of(const std::vector<benchmark::BenchmarkReporter::Run>& runs, const char* name) {
  using Run = benchmark::BenchmarkReporter::Run;
  std::vector<double> values;
  std::vector<double> aggregates;
  for (const auto& run : runs) {
    const auto counter = run.counters.find(name);
    if (counter == run.counters.end()) {
      continue;
    }
    if (run.run_type == Run::RT_Iteration) {
      values.push_back(counter->second);
    } else if (run.aggregate_name == "median") {
      aggregates.push_back(counter->second);
    }
  }
  values = values.empty() ? aggregates : values;
  return values.empty() ? std::nullopt : std::optional(median(values));
}

/// Prints the header of a table whose first column is text and whose others are numbers (right-aligned).
void print_header(std::ostream& out, const std::vector<std::string>& cells) {
  print_row(out, cells);
  out << "|---";
  for (std::size_t i = 1; i < cells.size(); ++i) {
    out << "|---:";
  }
  out << "|\n";
}

/// "average (minimum to maximum)".
std::string range(const std::vector<double>& values) {
  if (values.empty()) {
    return "-";
  }
  const double average = std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
  const auto [smallest, largest] = std::minmax_element(values.begin(), values.end());
  return fixed(average, 2) + "x (" + fixed(*smallest, 2) + "x to " + fixed(*largest, 2) + "x)";
}

}  // namespace

MarkdownReporter::MarkdownReporter(const Suite& suite, std::string preamble)
    : suite_(suite), preamble_(std::move(preamble)) {
}

bool MarkdownReporter::ReportContext(const Context& /*context*/) {
  GetOutputStream() << preamble_ << std::flush;
  return true;
}

void MarkdownReporter::ReportRuns(const std::vector<Run>& runs) {
  if (runs.empty()) {
    return;
  }
  const std::string& name = runs.front().run_name.function_name;
  const std::optional<double> seconds = median_of(runs, "median_s");
  if (!seconds) {
    failed_ = true;
    return;
  }
  if (const Case* benchmark_case = suite_.find_case(name)) {
    record(*benchmark_case, *seconds, median_of(runs, "peak_bytes"));
    if (const auto plans = median_of(runs, "plans")) {
      entry(current_->plans, benchmark_case->implementation) = static_cast<int64_t>(*plans);
    }
  } else if (const HostCall* call = suite_.find_host_call(name)) {
    host_costs_.emplace_back(*call, *seconds);
  }
}

void MarkdownReporter::Finalize() {
  report_configuration();
  report_host_costs();
  report_summary();
  GetOutputStream() << std::flush;
}

void MarkdownReporter::record(const Case& benchmark_case, double seconds, std::optional<double> peak_bytes) {
  const auto& [encoding, label, title, pass, implementation, bytes, trivial, operations] = benchmark_case;
  if (current_ && (current_->encoding != encoding || current_->label != label)) {
    report_configuration();
  }
  if (!current_) {
    current_ = Configuration{encoding, label, title, {}, {}, {}, {}, {}, {}};
  }
  entry(current_->measured, implementation)[index(pass)] = seconds;
  if (peak_bytes) {
    entry(current_->peak_bytes, implementation)[index(pass)] = peak_bytes;
  }
  current_->trivial[index(pass)] = trivial;
  if (bytes > 0) {
    current_->bytes[index(pass)] = static_cast<double>(bytes);
  }
  if (operations > 0) {
    current_->operations[index(pass)] = operations;
  }
}

void MarkdownReporter::report_configuration() {
  if (!current_) {
    return;
  }
  const auto [formulation, libtorch] = fastest_formulation(*current_);
  auto& out = GetOutputStream();
  out << "\n### " << current_->encoding << ": " << current_->title << "\n\n";
  if (!formulation.empty()) {
    out << "LibTorch: `" << formulation << "`, the fastest of";
    const char* separator = " ";
    for (const auto& [name, unused] : current_->measured) {
      if (is_formulation(name)) {
        out << separator << "`" << name << "` (total " << milliseconds(find(*current_, name)[index(Pass::total)])
            << " ms)";
        separator = ", ";
      }
    }
    out << ".\n\n";
  }
  print_table(*current_, libtorch);
  out << std::flush;
  current_.reset();
}

void MarkdownReporter::print_table(const Configuration& configuration, const Seconds& libtorch) {
  const Seconds posenc = find(configuration, kPosenc);
  const Seconds copy = find(configuration, kCopy);
  const Seconds fill = find(configuration, kFill);
  PerPass<double> bytes = configuration.bytes;
  auto& total_bytes = bytes[index(Pass::total)];
  total_bytes = total_bytes ? total_bytes : sum_of_passes(bytes);
  auto& speedups = entry(speedups_, configuration.encoding);
  auto& out = GetOutputStream();
  print_header(out, {"Pass", "LibTorch (ms)", "posenc (ms)", "Speedup", "GB/s", "% of copy speed"});
  for (const Pass pass : kPasses) {
    const auto i = index(pass);
    const auto speedup = configuration.trivial[i] ? std::nullopt : quotient(libtorch[i], posenc[i]);
    const auto bytes_per_second = quotient(bytes[i], posenc[i]);
    const auto of_copy = quotient(copy[i], posenc[i]);
    const auto of_fill = quotient(fill[i], posenc[i]);
    if (speedup) {
      speedups[i].push_back(*speedup);
    }
    print_row(
        out,
        {row_title(pass), milliseconds(libtorch[i]), milliseconds(posenc[i]), fixed(speedup, 2, "x"),
         bytes_per_second ? fixed(*bytes_per_second * 1e-9, bytes_per_second < 1e11 ? 1 : 0) : "-",
         of_copy       ? fixed(*of_copy * 100, 1)
             : of_fill ? fixed(*of_fill * 100, 1) + " (fill)"
                       : "-"});
  }
  print_ratios(posenc, copy, kCopy);
  print_ratios(posenc, fill, kFill);
  print_ratios(posenc, find(configuration, kWithoutBias), "attention without bias");
  print_ratios(posenc, find(configuration, kBareCudnn), "bare cuDNN graph");
  print_ratios(posenc, find(configuration, kPosencWithoutCudnn), "posenc without cuDNN");
  print_ratios(posenc, find(configuration, kPosencOneByOne), "one call for each sequence");
  print_ratios(posenc, find(configuration, kPosencPadded), "call padded to the longest sequence");
  print_ratios(posenc, find(configuration, kPosencAllKeys), "call without a window");
  print_ratios(
      find(configuration, kPosencWithoutSlopes), find(configuration, kWithoutBias),
      "attention without bias of LibTorch", "posenc without slopes");
  print_operations(configuration);
  print_memory(configuration);
}

void MarkdownReporter::print_operations(const Configuration& configuration) {
  for (const auto& [name, unused] : configuration.measured) {
    const Seconds seconds = find(configuration, name);
    std::ostringstream rates;
    for (const Pass pass : kPasses) {
      const auto i = index(pass);
      if (const auto rate = quotient(configuration.operations[i], seconds[i])) {
        rates << (rates.tellp() > 0 ? ", " : "") << to_string(pass) << " "
              << fixed(*rate * 1e-12, *rate < 1e13 ? 3 : 0);
      }
    }
    if (rates.tellp() > 0) {
      GetOutputStream() << "\nTFLOP/s of `" << name << "`: " << rates.str() << ".\n";
    }
  }
}

void MarkdownReporter::print_memory(const Configuration& configuration) {
  for (const auto& [name, bytes] : configuration.peak_bytes) {
    std::ostringstream peaks;
    for (const Pass pass : kPasses) {
      if (const auto& peak = bytes[index(pass)]) {
        peaks << (peaks.tellp() > 0 ? ", with the " : "") << to_string(pass) << " pass " << fixed(*peak * 0x1p-20, 1)
              << " MiB";
      }
    }
    GetOutputStream() << "\nPeak memory of `" << name << "` beyond its inputs: " << peaks.str() << ".\n";
  }
  for (const auto& [name, plans] : configuration.plans) {
    GetOutputStream() << "\ncuDNN plans built in all runs of `" << name << "`: " << plans << ".\n";
  }
}

void MarkdownReporter::print_ratios(
    const Seconds& seconds,
    const Seconds& measured,
    const char* yardstick,
    const char* subject) {
  std::ostringstream ratios;
  for (const Pass pass : kPasses) {
    const auto i = index(pass);
    if (const auto ratio = quotient(seconds[i], measured[i])) {
      ratios << (ratios.tellp() > 0 ? ", " : "") << to_string(pass) << " " << fixed(*ratio, 3) << " ("
             << milliseconds(measured[i]) << " ms)";
    }
  }
  if (ratios.tellp() > 0) {
    GetOutputStream() << "\n"
                      << subject << " takes this many times as long as the " << yardstick << ": " << ratios.str()
                      << ".\n";
  }
}

void MarkdownReporter::report_host_costs() {
  if (host_costs_.empty()) {
    return;
  }
  const auto cost = [&](const std::string& id) -> std::optional<double> {
    for (const auto& [call, seconds] : host_costs_) {
      if (call.id == id) {
        return seconds * 1e6;
      }
    }
    return std::nullopt;
  };
  auto& out = GetOutputStream();
  out << "\n### Host cost per call, tiny tensors\n\n";
  print_header(out, {"Call", "Microseconds"});
  for (const auto& [call, seconds] : host_costs_) {
    print_row(out, {call.title, fixed(seconds * 1e6, 2)});
  }
  for (const auto& difference : suite_.host_differences()) {
    const auto minuend = cost(difference.minuend);
    const auto subtrahend = cost(difference.subtrahend);
    if (minuend && subtrahend) {
      print_row(out, {difference.title, fixed(*minuend - *subtrahend, 2)});
    } else {
      print_row(out, {difference.title, "-"});
    }
  }
}

void MarkdownReporter::report_summary() {
  if (speedups_.empty()) {
    return;
  }
  auto& out = GetOutputStream();
  out << "\n### Speedup over LibTorch, average (minimum to maximum)\n\n";
  print_header(out, {"Encoding", "Forward", "Backward", "Total"});
  for (const auto& [encoding, speedups] : speedups_) {
    print_row(out, {encoding, range(speedups[0]), range(speedups[1]), range(speedups[2])});
  }
}

MarkdownReporter::Seconds MarkdownReporter::find(
    const Configuration& configuration,
    const std::string& implementation) {
  for (const auto& [name, measured] : configuration.measured) {
    if (name == implementation) {
      Seconds seconds = measured;
      auto& total = seconds[index(Pass::total)];
      total = total ? total : sum_of_passes(seconds);
      return seconds;
    }
  }
  return {};
}

std::pair<std::string, MarkdownReporter::Seconds> MarkdownReporter::fastest_formulation(
    const Configuration& configuration) {
  // Formulations with a total come first. If a filter excluded a pass, the sum of the others decides.
  const auto key = [](const Seconds& seconds) {
    const auto& total = seconds[index(Pass::total)];
    double sum = 0;
    for (const auto& pass : seconds) {
      sum += pass.value_or(0);
    }
    return std::pair(!total.has_value(), total.value_or(sum));
  };
  std::pair<std::string, Seconds> fastest;
  for (const auto& [name, unused] : configuration.measured) {
    const Seconds seconds = find(configuration, name);
    if (is_formulation(name) && (fastest.first.empty() || key(seconds) < key(fastest.second))) {
      fastest = {name, seconds};
    }
  }
  return fastest;
}

}  // namespace posenc::bench
