// KVB_CHECK: ends the program on what cannot happen. For our own bugs only,
// never for what a peer or the system can cause.
#ifndef KVBROKER_BROKER_BASE_CHECK_H_
#define KVBROKER_BROKER_BASE_CHECK_H_

#include <cstdio>
#include <cstdlib>

#define KVB_CHECK(condition)                                                \
  do {                                                                      \
    if (!(condition)) [[unlikely]] {                                        \
      std::fprintf(stderr, "%s:%d: check failed: %s\n", __FILE__, __LINE__, \
                   #condition);                                             \
      std::abort();                                                         \
    }                                                                       \
  } while (false)

#endif  // KVBROKER_BROKER_BASE_CHECK_H_
