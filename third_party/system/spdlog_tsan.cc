// Creates spdlog's default logger before main(), under TSan only.
//
// Debian's spdlog is not instrumented: TSan does not see that its lazily made
// registry is published safely and reports a race when two threads log first.
// Before main() there is one thread, and starting another orders the rest.

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define KVB_SPDLOG_UNDER_TSAN
#endif
#elif defined(__SANITIZE_THREAD__)
#define KVB_SPDLOG_UNDER_TSAN
#endif

#ifdef KVB_SPDLOG_UNDER_TSAN
#include <spdlog/spdlog.h>

namespace {
[[maybe_unused]] const bool kDefaultLoggerMade =
    spdlog::default_logger_raw() != nullptr;
}  // namespace
#endif
