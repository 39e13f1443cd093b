/* An engine that a test speaks to, over stdin and stdout: opens a session with
 * what its arguments say, and then does what it is told.
 *
 *   on_demand_engine NAME KVBROKERD [join|suffix|error [GPU]]
 *
 *   hold N   takes N blocks          -> "held N", or "short"
 *   health                           -> "health CODE TEXT"
 *   grow                             -> as `hold 1`, with up to 10 s of patience
 *   leave    closes and ends
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client/capi/kvbroker.h"

enum { kMaxBlocks = 1024 };
static size_t block_bytes = 1 << 16;
static const char* gpu = NULL;

static int conflict_of(const char* word) {
  if (strcmp(word, "suffix") == 0) return KVB_SUFFIX;
  if (strcmp(word, "error") == 0) return KVB_ERROR;
  return KVB_JOIN;
}

static void hold(kvb_pool* pool, int count, int64_t patience_ms) {
  static int32_t blocks[kMaxBlocks];
  if (kvb_pool_reserve(pool, (size_t)count, patience_ms) &&
      kvb_pool_alloc(pool, (size_t)count, KVB_RUNNING, blocks)) {
    char* memory = kvb_pool_region(pool, 0);
    for (int i = 0; i < count && gpu == NULL; ++i) {
      memset(memory + (size_t)blocks[i] * block_bytes, 1, block_bytes);
    }
    printf("held %d\n", count);
  } else {
    printf("short\n");
  }
}

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  if (argc > 4) {
    gpu = argv[4];
    block_bytes = 2 << 20;
  }
  setvbuf(stdout, NULL, _IOLBF, 0);
  kvb_pool_options pool_options;
  kvb_pool_options_init(&pool_options, sizeof(pool_options));
  pool_options.handle_bytes = block_bytes;
  pool_options.block_bytes = block_bytes;
  pool_options.max_pages = kMaxBlocks;
  pool_options.map_ahead = 0;

  kvb_session_options* options = kvb_session_options_new(argv[1]);
  if (gpu == NULL) {
    kvb_session_options_set_backend(options, "host");
  } else {
    kvb_session_options_set_gpu(options, gpu);
  }
  kvb_session_options_set_autostart(options, argv[2]);
  if (argc > 3) {
    kvb_session_options_set_name_conflict(options, conflict_of(argv[3]));
  }
  char* error = NULL;
  kvb_session* session = NULL;
  kvb_code code = kvb_session_options_add_pool(options, &pool_options, &error);
  if (code == KVB_OK) code = kvb_session_open(options, &session, &error);
  kvb_session_options_free(options);
  if (code != KVB_OK) {
    printf("failed %d %s\n", code, error);
    kvb_error_free(error);
    return 1;
  }
  printf("open %s joined=%s\n", kvb_session_instance(session),
         kvb_session_joined_pids(session));

  kvb_pool* pool = kvb_session_pool(session, 0);
  char line[64];
  while (fgets(line, sizeof(line), stdin) != NULL) {
    if (strncmp(line, "hold ", 5) == 0) {
      hold(pool, atoi(line + 5), 1000);
    } else if (strncmp(line, "grow", 4) == 0) {
      hold(pool, 1, 10000);
    } else if (strncmp(line, "health", 6) == 0) {
      code = kvb_session_health(session, &error);
      printf("health %d %s\n", code, code == KVB_OK ? "" : error);
      if (code != KVB_OK) kvb_error_free(error);
    } else if (strncmp(line, "leave", 5) == 0) {
      break;
    }
  }
  kvb_session_close(session);
  return 0;
}
