// RETURN_IF_ERROR and ASSIGN_OR_RETURN: hand a failed status to the caller.
#ifndef KVBROKER_BROKER_BASE_STATUS_MACROS_H_
#define KVBROKER_BROKER_BASE_STATUS_MACROS_H_

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define RETURN_IF_ERROR(expression)                               \
  do {                                                            \
    if (absl::Status kvb_status = (expression); !kvb_status.ok()) \
      return kvb_status;                                          \
  } while (false)

#define KVBROKER_CONCAT_INNER(a, b) a##b
#define KVBROKER_CONCAT(a, b) KVBROKER_CONCAT_INNER(a, b)

#define ASSIGN_OR_RETURN(declaration, expression)                      \
  auto KVBROKER_CONCAT(kvb_result_, __LINE__) = (expression);          \
  if (!KVBROKER_CONCAT(kvb_result_, __LINE__).ok())                    \
    return std::move(KVBROKER_CONCAT(kvb_result_, __LINE__)).status(); \
  declaration = *std::move(KVBROKER_CONCAT(kvb_result_, __LINE__))

#endif  // KVBROKER_BROKER_BASE_STATUS_MACROS_H_
