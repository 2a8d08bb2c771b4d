#pragma once

#include <posenc/export.h>

#include <string_view>

/// What the library has to say while it runs goes to standard error through one logger.
///
/// The level is read once from the environment variable `POSENC_LOG_LEVEL`: one of `trace`, `debug`, `info`,
/// `warning`, `error`, `critical`, `off`; default `warning`. At `debug` the library reports tables that it
/// builds and the kernels that it chooses; at `warning`, once each, the cases that run slower than they could.
///
/// Example:
/// ```
/// posenc::set_log_level(posenc::LogLevel::debug);
/// ```
namespace posenc {

enum class LogLevel : int { trace, debug, info, warning, error, critical, off };

/// Replaces the level taken from `POSENC_LOG_LEVEL`. Safe to call from any thread.
POSENC_API void set_log_level(LogLevel level);

/// The level in force.
POSENC_API LogLevel log_level();

/// Writes one line at `level`; nothing when the level in force is higher. Safe to call from any thread.
POSENC_API void log(LogLevel level, std::string_view message);

}  // namespace posenc
