/* An engine with a shared-memory view, which does as it is told on stdin.
 *
 *   view_program ADDRESS DIRECTORY NAME
 *
 * Says "ready" once its session is open; then "alloc N" (blocks), "max N"
 * (bytes, as an operator), "limit" and "spin MS" (nothing, for so long; prints
 * the CPU time of the process meanwhile in microseconds), each answered by a
 * line. Ends in order at the end of its input.
 */
#define _POSIX_C_SOURCE 200809L

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "client/capi/kvbroker.h"

enum { kBlockBytes = 4096, kPageBytes = 64 * 1024, kMaxBlocks = 1024 };

static int fail(const char* what, char* error) {
  printf("%s: %s\n", what, error != NULL ? error : "failed");
  kvb_error_free(error);
  return 1;
}

static void sleep_ms(long ms) {
  struct timespec pause = {ms / 1000, ms % 1000 * 1000000};
  nanosleep(&pause, NULL);
}

static long cpu_us(void) {
  struct timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return now.tv_sec * 1000000L + now.tv_nsec / 1000;
}

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  setvbuf(stdout, NULL, _IOLBF, 0);
  kvb_pool_options pool_options;
  kvb_pool_options_init(&pool_options, sizeof(pool_options));
  pool_options.handle_bytes = kPageBytes;
  pool_options.max_pages = 1024;
  pool_options.block_bytes = kBlockBytes;
  pool_options.map_ahead = 0;
  pool_options.min_reserved_pages = 0;

  char* error = NULL;
  kvb_session_options* options = kvb_session_options_new(argv[3]);
  kvb_session_options_set_address(options, argv[1]);
  kvb_session_options_set_shm_view(options, argv[2]);
  kvb_session_options_set_max(options, 4000000);
  kvb_session* session = NULL;
  kvb_code code = kvb_session_options_add_pool(options, &pool_options, &error);
  if (code == KVB_OK) code = kvb_session_open(options, &session, &error);
  kvb_session_options_free(options);
  if (code != KVB_OK) return fail("opening a session", error);
  puts("ready");

  kvb_pool* pool = kvb_session_pool(session, 0);
  static int32_t blocks[kMaxBlocks];
  char line[128];
  while (fgets(line, sizeof(line), stdin) != NULL) {
    unsigned long long n = 0;
    if (sscanf(line, "alloc %llu", &n) == 1 && n <= kMaxBlocks) {
      int tries = 0;
      while (!kvb_pool_alloc(pool, n, KVB_WAITING, blocks)) {
        if (++tries > 20000) return fail("alloc", NULL);
        sleep_ms(1);
      }
      puts("done");
    } else if (sscanf(line, "max %llu", &n) == 1) {
      error = NULL;
      code = kvb_session_set_max(session, n, &error);
      kvb_limits limits = {.size = sizeof(limits)};
      kvb_session_limits(session, &limits);
      printf("%d %llu\n", code, (unsigned long long)limits.max_bytes);
      kvb_error_free(error);
    } else if (strncmp(line, "limit", 5) == 0) {
      kvb_limits limits = {.size = sizeof(limits)};
      kvb_session_limits(session, &limits);
      printf("%llu\n", (unsigned long long)limits.max_bytes);
    } else if (sscanf(line, "spin %llu", &n) == 1) {
      const long before = cpu_us();
      sleep_ms((long)n);
      printf("%ld\n", cpu_us() - before);
    } else {
      puts("what?");
    }
  }
  kvb_session_close(session);
  return 0;
}
