/* Borrows memory for 64 blocks, writes to it and gives it back.
 *
 *   cc example.c -lkvbroker -o example && ./example [BROKER]
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "client/capi/kvbroker.h"

enum { kBlocks = 64, kBlockBytes = 4096 };

static int fail(const char* what, char* error) {
  fprintf(stderr, "%s: %s\n", what, error != NULL ? error : "failed");
  kvb_error_free(error);
  return 1;
}

int main(int argc, char** argv) {
  char* error = NULL;

  /* One pool: pages of 64 KiB of which each holds 16 blocks, 1,024 at most. */
  kvb_pool_options pool_options;
  kvb_pool_options_init(&pool_options, sizeof(pool_options));
  pool_options.handle_bytes = 64 * 1024;
  pool_options.max_pages = 1024;
  pool_options.block_bytes = kBlockBytes;

  kvb_session_options* options = kvb_session_options_new("example");
  if (argc > 1) kvb_session_options_set_address(options, argv[1]);
  kvb_session* session = NULL;
  kvb_code code =
      kvb_session_options_add_pool(options, &pool_options, &error);
  if (code == KVB_OK) code = kvb_session_open(options, &session, &error);
  kvb_session_options_free(options);
  if (code != KVB_OK) return fail("opening a session", error);

  /* Have the memory set aside, for at most five seconds, then take it. An engine
   * tries kvb_pool_alloc at each step instead: a miss is pursued meanwhile. */
  kvb_pool* pool = kvb_session_pool(session, 0);
  int32_t blocks[kBlocks];
  if (!kvb_pool_reserve(pool, kBlocks, 5000) ||
      !kvb_pool_alloc(pool, kBlocks, KVB_WAITING, blocks)) {
    kvb_session_close(session);
    return fail("taking blocks", NULL);
  }

  char* memory = kvb_pool_region(pool, 0);
  for (int i = 0; i < kBlocks; ++i) {
    memset(memory + (size_t)blocks[i] * kBlockBytes, i, kBlockBytes);
  }
  printf("%s: %d blocks in use, %zu more at hand\n",
         kvb_session_instance(session), kBlocks, kvb_pool_available(pool));

  code = kvb_pool_free(pool, blocks, kBlocks, &error);
  kvb_session_close(session);
  return code == KVB_OK ? 0 : fail("freeing blocks", error);
}
