/* The C ABI from plain C, against a live broker (capi_test.sh): what each
 * function promises, and what it says to wrong use.
 *
 *   capi_program ADDRESS          all but
 *   capi_program ADDRESS PID      what happens when the broker, PID, dies
 */
#define _POSIX_C_SOURCE 200809L

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "client/capi/kvbroker.h"

#define CHECK(condition)                                      \
  do {                                                        \
    if (!(condition)) {                                       \
      fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, \
              #condition);                                    \
      exit(1);                                                \
    }                                                         \
  } while (0)

enum {
  kBlockBytes = 4096,
  kPageBytes = 64 * 1024,
  kBlocksPerPage = kPageBytes / kBlockBytes,
  kMiB = 1 << 20
};

/* ---- what this thread allocates ---- */

#if defined(__SANITIZE_ADDRESS__)
static void begin_counting(void) {}
static size_t end_counting(void) { return 0; }
#else
static __thread size_t mallocs;
extern void* __libc_malloc(size_t size);
void* malloc(size_t size) {
  ++mallocs;
  return __libc_malloc(size);
}
static void begin_counting(void) { mallocs = 0; }
static size_t end_counting(void) { return mallocs; }
#endif

/* ---- sessions to test with ---- */

struct told {
  int preempts;
  int memory;
  uint64_t closing;
};

static void on_preempt(void* context) {
  __atomic_add_fetch(&((struct told*)context)->preempts, 1, __ATOMIC_SEQ_CST);
}
static void on_closing(void* context, uint64_t pages) {
  __atomic_add_fetch(&((struct told*)context)->closing, pages,
                     __ATOMIC_SEQ_CST);
}
static void on_memory(void* context) {
  __atomic_add_fetch(&((struct told*)context)->memory, 1, __ATOMIC_SEQ_CST);
}

static kvb_pool_options pool_options(struct told* told) {
  kvb_pool_options pool;
  kvb_pool_options_init(&pool, sizeof(pool));
  pool.handle_bytes = kPageBytes;
  pool.max_pages = 1024;
  pool.block_bytes = kBlockBytes;
  pool.map_ahead = 0;
  pool.min_reserved_pages = 0;
  pool.on_preempt = on_preempt;
  pool.on_closing = on_closing;
  pool.on_memory = on_memory;
  pool.context = told;
  return pool;
}

static kvb_session_options* session_options(const char* instance,
                                            const char* address) {
  kvb_session_options* options = kvb_session_options_new(instance);
  kvb_session_options_set_address(options, address);
  kvb_session_options_set_timeout(options, 20000);
  return options;
}

/* Ends the options. */
static kvb_session* open_session(kvb_session_options* options) {
  kvb_session* session = NULL;
  char* error = NULL;
  kvb_code code = kvb_session_open(options, &session, &error);
  if (code != KVB_OK) fprintf(stderr, "open: %d %s\n", code, error);
  CHECK(code == KVB_OK && error == NULL);
  kvb_session_options_free(options);
  return session;
}

/* ---- waiting; the limit is for giving up only ---- */

static int tries;
static void pause_a_little(void) {
  struct timespec pause = {0, 1000000};
  nanosleep(&pause, NULL);
  CHECK(++tries < 30000);
}

static void alloc_patiently(kvb_pool* pool, size_t count, int32_t* blocks) {
  tries = 0;
  while (!kvb_pool_alloc(pool, count, KVB_WAITING, blocks)) pause_a_little();
}

/* ---- the tests ---- */

static void test_versions(void) {
  CHECK(kvb_abi_version() == KVB_ABI_VERSION);

  /* A program that knew of the first fields only. */
  struct {
    kvb_pool_options options;
    char beyond;
  } old;
  memset(&old, 0x5a, sizeof(old));
  const size_t old_size = offsetof(kvb_pool_options, layout);
  kvb_pool_options_init(&old.options, old_size);
  CHECK(old.options.size == old_size && old.options.handles_per_page == 1);
  CHECK(((char*)&old.options)[old_size] == 0x5a);
  kvb_usage usage;
  memset(&usage, 0x5a, sizeof(usage));

  /* One that knows more than the library. */
  kvb_session_options* options = kvb_session_options_new("c-program");
  kvb_pool_options newer = pool_options(NULL);
  newer.size = sizeof(newer) + 8;
  char* error = NULL;
  CHECK(kvb_session_options_add_pool(options, &newer, &error) ==
        KVB_FAILED_PRECONDITION);
  CHECK(strstr(error, "newer") != NULL);
  kvb_error_free(error);
  kvb_session_options_free(options);
}

static void check_pool_refused(kvb_pool_options pool, const char* what) {
  kvb_session_options* options = kvb_session_options_new("c-program");
  char* error = NULL;
  CHECK(kvb_session_options_add_pool(options, &pool, &error) ==
        KVB_INVALID_ARGUMENT);
  CHECK(strstr(error, what) != NULL);
  kvb_error_free(error);
  CHECK(kvb_session_options_add_pool(options, &pool, NULL) ==
        KVB_INVALID_ARGUMENT);
  kvb_session_options_free(options);
}

static void test_wrong_options(const char* address) {
  kvb_pool_options pool = pool_options(NULL);
  pool.block_bytes = 0;
  check_pool_refused(pool, "block_bytes");
  pool = pool_options(NULL);
  pool.max_pages = 0;
  check_pool_refused(pool, "max_pages");
  pool = pool_options(NULL);
  pool.layout = 7;
  check_pool_refused(pool, "layout");
  pool = pool_options(NULL);
  pool.idle_decay_ms = -1;
  check_pool_refused(pool, "times");
  pool = pool_options(NULL);
  pool.guard = 1;
  pool.layout = KVB_PER_LAYER;
  check_pool_refused(pool, "guard is for the contiguous layout");

  struct {
    const char* instance;
    const char* address;
    const char* says;
  } const wrong[] = {
      {"c-program", "/nonexistent/broker.sock", "/nonexistent"},
      {"no such name!", address, "instance"},
      {"c-program", address, "pools"}, /* has none */
  };
  for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); ++i) {
    kvb_session_options* options =
        session_options(wrong[i].instance, wrong[i].address);
    kvb_session* none = NULL;
    char* error = NULL;
    CHECK(kvb_session_open(options, &none, &error) != KVB_OK);
    CHECK(none == NULL && error != NULL);
    if (strstr(error, wrong[i].says) == NULL) fprintf(stderr, "%s\n", error);
    CHECK(strstr(error, wrong[i].says) != NULL);
    kvb_error_free(error);
    kvb_session_options_free(options);
  }

  /* What only the broker knows to be wrong. */
  kvb_session_options* options = session_options("c-program", address);
  pool = pool_options(NULL);
  pool.handle_bytes = 4097;
  CHECK(kvb_session_options_add_pool(options, &pool, NULL) == KVB_OK);
  kvb_session* none = NULL;
  char* error = NULL;
  CHECK(kvb_session_open(options, &none, &error) == KVB_INVALID_ARGUMENT);
  CHECK(strstr(error, "handle_bytes") != NULL);
  kvb_error_free(error);
  kvb_session_options_free(options);

  /* And what this library cannot map. */
  options = session_options("c-program", address);
  pool = pool_options(NULL);
  CHECK(kvb_session_options_add_pool(options, &pool, NULL) == KVB_OK);
  kvb_session_options_set_backend(options, "rocm");
  CHECK(kvb_session_open(options, &none, &error) == KVB_INVALID_ARGUMENT);
  CHECK(strstr(error, "rocm") != NULL);
  kvb_error_free(error);
  kvb_session_options_free(options);
  kvb_session_close(NULL);
}

static void test_session(const char* address) {
  struct told told = {0};
  kvb_session_options* options = session_options("c-session", address);
  kvb_session_options_set_member(options, "replica-0");
  kvb_session_options_set_min(options, kMiB);
  kvb_session_options_set_max(options, 4 * kMiB);
  kvb_session_options_set_weight(options, 2);
  kvb_session_options_set_declared_peak(options, kMiB);
  kvb_session_options_set_label(options, "language", "C");
  kvb_pool_options pool = pool_options(&told);
  pool.reserve_null_block = 1;
  CHECK(kvb_session_options_add_pool(options, &pool, NULL) == KVB_OK);
  pool.handle_bytes = kPageBytes / 4;
  pool.handles_per_page = 4;
  pool.layout = KVB_PER_LAYER;
  pool.reserve_null_block = 0;
  CHECK(kvb_session_options_add_pool(options, &pool, NULL) == KVB_OK);
  kvb_session* session = open_session(options);

  CHECK(strcmp(kvb_session_instance(session), "c-session") == 0);
  CHECK(kvb_session_health(session, NULL) == KVB_OK);
  kvb_limits limits = {.size = sizeof(limits)};
  kvb_session_limits(session, &limits);
  CHECK(limits.size == sizeof(limits) && limits.min_bytes == kMiB);
  CHECK(limits.max_bytes == 4 * kMiB && limits.capacity_bytes == 8 * kMiB);

  kvb_pool* first = kvb_session_pool(session, 0);
  kvb_pool* second = kvb_session_pool(session, 1);
  CHECK(first != NULL && second != NULL && first != second);
  CHECK(kvb_session_pool(session, 2) == NULL);
  CHECK(kvb_pool_capacity(first) == 4 * kMiB / kBlockBytes - 1);
  CHECK(kvb_pool_region(first, 0) != NULL);
  CHECK(kvb_pool_region(first, 1) == NULL);
  CHECK(kvb_pool_region(second, 3) != NULL);
  CHECK(kvb_pool_region(second, 4) == NULL);
  /* Nobody else uses the host's memory: there is room at once. */
  CHECK(kvb_session_make_room(session, kMiB, 10000, NULL) == KVB_OK);
  /* Host memory has no streams: whatever is named is nobody's. */
  kvb_pool_add_stream(first, NULL);
  kvb_pool_remove_stream(first, NULL);

  /* Per layer, page p's handle h lies in region h. */
  int32_t blocks[kBlocksPerPage];
  alloc_patiently(second, kBlocksPerPage, blocks);
  const size_t page = (size_t)blocks[0] / kBlocksPerPage;
  for (size_t h = 0; h < 4; ++h) {
    char* at = (char*)kvb_pool_region(second, h) + page * (kPageBytes / 4);
    memset(at, (int)h, kPageBytes / 4);
  }
  CHECK(kvb_pool_free(second, blocks, kBlocksPerPage, NULL) == KVB_OK);

  /* A child has no part in it, and does not hang. */
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    const kvb_code code = kvb_session_health(session, NULL);
    kvb_session_close(session);
    _exit(code == KVB_FAILED_PRECONDITION ? 0 : 1);
  }
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(kvb_session_health(session, NULL) == KVB_OK);

  kvb_session_close(session);
}

static void test_blocks(const char* address) {
  enum { kBlocks = 32 };
  struct told told = {0};
  kvb_session_options* options = session_options("c-blocks", address);
  kvb_session_options_set_max(options, 4 * kMiB);
  kvb_pool_options wanted = pool_options(&told);
  wanted.reserve_null_block = 1;
  CHECK(kvb_session_options_add_pool(options, &wanted, NULL) == KVB_OK);
  kvb_session* session = open_session(options);
  kvb_pool* pool = kvb_session_pool(session, 0);

  /* Blocks are memory of our own, each its own. */
  int32_t blocks[kBlocks];
  alloc_patiently(pool, kBlocks, blocks);
  /* Whoever asks may have the memory before it is told of it. */
  tries = 0;
  while (__atomic_load_n(&told.memory, __ATOMIC_SEQ_CST) == 0) pause_a_little();
  char* base = kvb_pool_region(pool, 0);
  for (int i = 0; i < kBlocks; ++i) {
    CHECK(blocks[i] != 0);
    memset(base + (size_t)blocks[i] * kBlockBytes, i + 1, kBlockBytes);
  }
  for (int i = 0; i < kBlocks; ++i) {
    const char* block = base + (size_t)blocks[i] * kBlockBytes;
    CHECK(block[0] == i + 1 && block[kBlockBytes - 1] == i + 1);
  }
  kvb_usage usage = {.size = sizeof(usage)};
  kvb_pool_usage(pool, &usage);
  CHECK(usage.in_use_bytes >= kBlocks * kBlockBytes);

  /* Steps, and a prefix cache. */
  kvb_pool_step_begin(pool);
  kvb_pool_step_end(pool, 1);
  const uint32_t generation = kvb_pool_generation(pool, blocks[0]);
  CHECK(kvb_pool_generation(pool, -1) == 0);
  CHECK(kvb_pool_generation(pool, INT32_MAX) == 0);
  char* error = NULL;
  CHECK(kvb_pool_cache(pool, blocks, 1, &error) == KVB_OK);
  CHECK(kvb_pool_touch(pool, blocks, &generation, 1));
  const uint32_t wrong = generation + 1;
  CHECK(!kvb_pool_touch(pool, blocks, &wrong, 1));
  kvb_pool_step_done(pool, 1);
  kvb_removal removals[4];
  CHECK(kvb_pool_drain_removals(pool, removals, 4) == 0);
  CHECK(kvb_pool_pages_to_vacate(pool) == 0);
  int32_t vacate[4];
  CHECK(kvb_pool_blocks_to_vacate(pool, vacate, 4) == 0);

  CHECK(kvb_pool_free(pool, blocks, kBlocks, &error) == KVB_OK);
  CHECK(error == NULL);
  CHECK(kvb_pool_free(pool, blocks, 1, &error) == KVB_INVALID_ARGUMENT);
  CHECK(error != NULL);
  kvb_error_free(error);
  CHECK(kvb_pool_free(pool, blocks, 1, NULL) == KVB_INVALID_ARGUMENT);
  CHECK(kvb_pool_available(pool) >= kBlocks);
  CHECK(kvb_pool_alloc(pool, 0, KVB_WAITING, NULL));

  /* While mapped pages last nothing is allocated. */
  int failed = 0;
  begin_counting();
  for (uint64_t step = 2; step < 10000; ++step) {
    kvb_pool_step_begin(pool);
    failed |= !kvb_pool_alloc(pool, 16, KVB_RUNNING, blocks);
    kvb_pool_step_end(pool, step);
    failed |= kvb_pool_free(pool, blocks, 16, NULL) != KVB_OK;
    kvb_pool_step_done(pool, step);
  }
  const size_t allocations = end_counting();
  CHECK(!failed);
  if (allocations != 0) fprintf(stderr, "allocations: %zu\n", allocations);
  CHECK(allocations == 0);

  /* Memory set aside counts before it is mapped; beyond the limit is none. */
  CHECK(kvb_pool_reserve(pool, 128, 10000));
  CHECK(kvb_pool_available(pool) >= 128);
  CHECK(!kvb_pool_reserve(pool, 1u << 20, 200));
  int32_t* many = malloc(sizeof(int32_t) << 16);
  CHECK(!kvb_pool_alloc(pool, 1u << 16, KVB_RUNNING, many));
  free(many);

  kvb_session_close(session);
}

/* One engine's prefix cache and requests give way to another, which is below
 * what it was guaranteed. */
static void test_giving_way(const char* address) {
  enum { kAll = 8 * kMiB / kBlockBytes, kHalf = kAll / 2 };
  static int32_t old_blocks[kAll], new_blocks[kHalf];
  struct told told = {0}, unused = {0};
  kvb_session_options* options = session_options("c-greedy", address);
  kvb_pool_options wanted = pool_options(&told);
  CHECK(kvb_session_options_add_pool(options, &wanted, NULL) == KVB_OK);
  kvb_session* greedy = open_session(options);
  options = session_options("c-modest", address);
  kvb_session_options_set_min(options, 4 * kMiB);
  wanted = pool_options(&unused);
  CHECK(kvb_session_options_add_pool(options, &wanted, NULL) == KVB_OK);
  kvb_session* modest = open_session(options);

  kvb_pool* old_pool = kvb_session_pool(greedy, 0);
  alloc_patiently(old_pool, kAll, old_blocks);
  /* A quarter is cached, so that both caches and requests have to go. */
  enum { kCached = kAll / 4 };
  static uint32_t generations[kCached];
  for (int i = 0; i < kCached; ++i) {
    generations[i] = kvb_pool_generation(old_pool, old_blocks[i]);
  }
  CHECK(kvb_pool_cache(old_pool, old_blocks, kCached, NULL) == KVB_OK);

  kvb_pool* new_pool = kvb_session_pool(modest, 0);
  tries = 0;
  while (!kvb_pool_alloc(new_pool, kHalf, KVB_WAITING, new_blocks)) {
    int32_t vacate[256];
    const size_t count = kvb_pool_blocks_to_vacate(old_pool, vacate, 256);
    CHECK(kvb_pool_free(old_pool, vacate, count, NULL) == KVB_OK);
    pause_a_little();
  }
  CHECK(__atomic_load_n(&told.preempts, __ATOMIC_SEQ_CST) > 0);
  CHECK(__atomic_load_n(&told.closing, __ATOMIC_SEQ_CST) > 0);
  size_t removed = 0, got;
  kvb_removal removals[100];
  while ((got = kvb_pool_drain_removals(old_pool, removals, 100)) > 0) {
    removed += got;
  }
  CHECK(removed == kCached);
  CHECK(!kvb_pool_touch(old_pool, old_blocks, generations, 1));

  kvb_session_close(greedy);
  kvb_session_close(modest);
}

static void check_policy_refused(const char* address, kvb_policy policy,
                                 kvb_code code, const char* says) {
  char* error = NULL;
  const kvb_code got =
      kvb_set_policy(address, NULL, "c-admin", &policy, 10000, &error);
  if (got != code) fprintf(stderr, "policy: %d %s\n", got, error);
  CHECK(got == code);
  if (strstr(error, says) == NULL) fprintf(stderr, "policy: %s\n", error);
  CHECK(strstr(error, says) != NULL);
  kvb_error_free(error);
}

/* What operators ask. */
static void test_admin(const char* address) {
  char* json = NULL;
  char* error = NULL;
  CHECK(kvb_list_instances(address, NULL, 10000, &json, &error) == KVB_OK);
  CHECK(error == NULL && strcmp(json, "[]\n") == 0);
  kvb_text_free(json);
  kvb_text_free(NULL);

  struct told told = {0};
  kvb_session_options* options = session_options("c-admin", address);
  kvb_pool_options pool = pool_options(&told);
  CHECK(kvb_session_options_add_pool(options, &pool, NULL) == KVB_OK);
  kvb_session* session = open_session(options);

  CHECK(kvb_list_instances(address, NULL, 10000, &json, NULL) == KVB_OK);
  CHECK(strstr(json, "\"ipc\": \"c-admin\"") != NULL);
  CHECK(strstr(json, "\"limit_bytes\": ") != NULL);
  CHECK(strstr(json, "\"used_bytes\": 0") != NULL);
  kvb_text_free(json);
  CHECK(kvb_list_brokers(address, NULL, KVB_FOREVER, &json, NULL) == KVB_OK);
  static const char* const fields[] = {
      "version",     "backend",      "backend_reason", "device_uuid",
      "incarnation", "pid",          "total_bytes",    "capacity_bytes",
      "held_bytes",  "stock_bytes",  "sessions",       "uptime_seconds",
      "state",       "others_bytes", "foreign_bytes",  "declared_bytes",
      "device_error"};
  for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); ++i) {
    char quoted[64];
    snprintf(quoted, sizeof(quoted), "\"%s\": ", fields[i]);
    CHECK(strstr(json, quoted) != NULL);
  }
  CHECK(strstr(json, "\"capacity_bytes\": 8388608") != NULL);
  CHECK(strstr(json, "\"sessions\": 1,") != NULL);
  kvb_text_free(json);

  /* By name, and by the session's own. */
  kvb_policy policy = {.size = sizeof(policy),
                       .fields = KVB_POLICY_MAX | KVB_POLICY_WEIGHT,
                       .max_bytes = 3 * kMiB + 1,
                       .weight = 2};
  CHECK(kvb_set_policy(address, NULL, "c-admin", &policy, 10000, &error) ==
        KVB_OK);
  kvb_limits limits = {.size = sizeof(limits)};
  tries = 0;
  do {
    pause_a_little();
    kvb_session_limits(session, &limits);
  } while (limits.max_bytes != 3 * kMiB + 1);
  for (uint64_t max = 0; max <= 5 * kMiB; max += kMiB / 2 + 1) {
    CHECK(kvb_session_set_max(session, max, &error) == KVB_OK);
    kvb_session_limits(session, &limits);
    CHECK(limits.max_bytes == max);
  }
  CHECK(kvb_session_set_max(session, UINT64_MAX, &error) ==
        KVB_INVALID_ARGUMENT);
  kvb_error_free(error);
  policy = (kvb_policy){.size = sizeof(policy),
                        .fields = KVB_POLICY_MAX_PERCENT | KVB_POLICY_MIN,
                        .min_bytes = kMiB,
                        .max_percent = 100};
  CHECK(kvb_set_policy(address, NULL, "c-admin", &policy, 10000, NULL) ==
        KVB_OK);
  policy = (kvb_policy){.size = sizeof(policy),
                        .fields = KVB_POLICY_MIN,
                        .preset = 1,
                        .min_bytes = 64 * kMiB};
  check_policy_refused(address, policy, KVB_FAILED_PRECONDITION, "guaranteed");
  policy.fields = 0;
  check_policy_refused(address, policy, KVB_INVALID_ARGUMENT, "fields");
  policy.fields = 1u << 20;
  check_policy_refused(address, policy, KVB_INVALID_ARGUMENT, "fields");
  policy.fields = KVB_POLICY_MAX | KVB_POLICY_MAX_PERCENT;
  check_policy_refused(address, policy, KVB_INVALID_ARGUMENT, "not both");
  policy.fields = KVB_POLICY_MAX_PERCENT;
  policy.max_percent = 101;
  check_policy_refused(address, policy, KVB_INVALID_ARGUMENT, "max_percent");
  policy.fields = KVB_POLICY_WEIGHT;
  policy.weight = -1;
  check_policy_refused(address, policy, KVB_INVALID_ARGUMENT, "weight");
  policy.size = sizeof(policy) + 8;
  check_policy_refused(address, policy, KVB_FAILED_PRECONDITION, "newer");

  policy = (kvb_policy){.size = sizeof(policy), .fields = KVB_POLICY_MAX};
  CHECK(kvb_set_policy(address, NULL, "nobody", &policy, 10000, &error) ==
        KVB_NOT_FOUND);
  CHECK(strstr(error, "c-admin") != NULL); /* those that exist */
  kvb_error_free(error);

  /* No broker at all. */
  json = NULL;
  CHECK(kvb_list_instances("/nonexistent", NULL, 10000, &json, &error) ==
        KVB_NOT_FOUND);
  CHECK(json == NULL && strstr(error, "/nonexistent") != NULL);
  kvb_error_free(error);
  CHECK(kvb_list_brokers(address, "GPU-none", 10000, &json, &error) ==
        KVB_NOT_FOUND);
  CHECK(json == NULL);
  kvb_error_free(error);

  /* KVBROKER_ADDRESS, where no address is given. */
  CHECK(setenv("KVBROKER_ADDRESS", address, 1) == 0);
  CHECK(kvb_list_instances(NULL, NULL, 10000, &json, NULL) == KVB_OK);
  CHECK(strstr(json, "c-admin") != NULL);
  kvb_text_free(json);
  CHECK(unsetenv("KVBROKER_ADDRESS") == 0);

  /* A child does not hang. */
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    const kvb_code code = kvb_list_instances(address, NULL, 10000, &json, NULL);
    _exit(code == KVB_FAILED_PRECONDITION ? 0 : 1);
  }
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  kvb_session_close(session);
}

/* The view's whole test is tests/integration/shm_view_test. */
static void test_shm_view(const char* address) {
  char directory[] = "/tmp/kvb_view_XXXXXX";
  CHECK(mkdtemp(directory) != NULL);
  char path[64];
  snprintf(path, sizeof(path), "%s/c-view", directory);
  struct told told = {0};
  kvb_session_options* options = session_options("c-view", address);
  kvb_session_options_set_shm_view(options, directory);
  kvb_session_options_set_max(options, 3 * kMiB);
  kvb_pool_options pool = pool_options(&told);
  CHECK(kvb_session_options_add_pool(options, &pool, NULL) == KVB_OK);
  kvb_session* session = open_session(options);
  FILE* file = fopen(path, "rb");
  CHECK(file != NULL);
  int64_t figures[4];
  CHECK(fread(figures, 1, sizeof(figures), file) == 24);
  CHECK(figures[0] == 3 * kMiB && figures[1] == 0 && figures[2] == 0);
  fclose(file);
  kvb_session_close(session);
  CHECK(access(path, F_OK) != 0);

  /* By default there is none, and one that cannot be costs nothing else. */
  options = session_options("c-view", address);
  kvb_session_options_set_shm_view(options, directory);
  kvb_session_options_set_shm_view(options, NULL);
  CHECK(kvb_session_options_add_pool(options, &pool, NULL) == KVB_OK);
  session = open_session(options);
  CHECK(access(path, F_OK) != 0);
  kvb_session_close(session);
  CHECK(rmdir(directory) == 0);
  options = session_options("c-view", address);
  kvb_session_options_set_shm_view(options, directory);
  CHECK(kvb_session_options_add_pool(options, &pool, NULL) == KVB_OK);
  session = open_session(options);
  CHECK(kvb_session_health(session, NULL) == KVB_OK);
  kvb_session_close(session);
}

/* The pools live on without the broker, and say so. */
static void test_without_broker(const char* address, pid_t broker) {
  enum { kBlocks = 16 };
  struct told told = {0};
  kvb_session_options* options = session_options("c-alone", address);
  kvb_pool_options wanted = pool_options(&told);
  CHECK(kvb_session_options_add_pool(options, &wanted, NULL) == KVB_OK);
  kvb_session* session = open_session(options);
  kvb_pool* pool = kvb_session_pool(session, 0);
  int32_t blocks[kBlocks];
  alloc_patiently(pool, kBlocks, blocks);
  CHECK(kill(broker, SIGKILL) == 0);
  tries = 0;
  char* error = NULL;
  while (kvb_session_health(session, &error) == KVB_OK) pause_a_little();
  CHECK(error != NULL);
  kvb_error_free(error);
  error = NULL;
  CHECK(kvb_session_set_max(session, kMiB, &error) == KVB_UNAVAILABLE);
  kvb_error_free(error);
  char* json = NULL;
  error = NULL;
  CHECK(kvb_list_brokers(address, NULL, 10000, &json, &error) ==
        KVB_UNAVAILABLE);
  CHECK(json == NULL && error != NULL);
  kvb_error_free(error);
  memset((char*)kvb_pool_region(pool, 0) + (size_t)blocks[0] * kBlockBytes, 1,
         kBlockBytes);
  CHECK(kvb_pool_free(pool, blocks, kBlocks, NULL) == KVB_OK);
  CHECK(kvb_pool_alloc(pool, kBlocks, KVB_RUNNING, blocks));
  CHECK(!kvb_pool_alloc(pool, kBlocks, KVB_RUNNING, blocks));
  CHECK(!kvb_pool_reserve(pool, kBlocks, KVB_FOREVER));
  kvb_session_close(session);
}

int main(int argc, char** argv) {
  CHECK(argc == 2 || argc == 3);
  if (argc == 3) {
    test_without_broker(argv[1], (pid_t)atol(argv[2]));
  } else {
    test_versions();
    test_wrong_options(argv[1]);
    test_session(argv[1]);
    test_blocks(argv[1]);
    test_giving_way(argv[1]);
    test_admin(argv[1]);
    test_shm_view(argv[1]);
  }
  puts("PASSED");
  return 0;
}
