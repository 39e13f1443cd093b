/* kvbroker: a KV cache pool on memory borrowed from a kvbrokerd, for C.
 *
 *   kvb_session_options* options = kvb_session_options_new("llama");
 *   kvb_session_options_add_pool(options, &pool_options, NULL);
 *   kvb_session* session;
 *   char* error = NULL;
 *   if (kvb_session_open(options, &session, &error) != KVB_OK) ...
 *   kvb_pool* pool = kvb_session_pool(session, 0);
 *   int32_t blocks[16];
 *   if (kvb_pool_alloc(pool, 16, KVB_RUNNING, blocks)) ...
 *   kvb_pool_free(pool, blocks, 16, NULL);
 *   kvb_session_close(session);
 *
 * example.c is a whole program, docs/api/c.md says more. Conventions:
 * 1. A function that can fail returns a kvb_code; KVB_OK is 0. Where it takes a
 *    char** error, that may be NULL; on failure it is set to a message that the
 *    caller gives to kvb_error_free. On success it is untouched.
 * 2. Handles are opaque. kvb_*_new and kvb_session_open give one that is the
 *    caller's to end with kvb_*_free or kvb_session_close. kvb_session_pool gives
 *    one that lives as long as its session.
 * 3. Strings that are passed in are copied. Strings that come out belong to the
 *    handle and live as long, but for errors (1).
 * 4. Sizes are bytes unless named blocks or pages. Times are milliseconds unless
 *    named _us; KVB_FOREVER is no limit.
 * 5. Every function may be called from any thread, but a handle is not used
 *    while or after it is ended, and options by one thread at a time. Callbacks
 *    come from the session's own thread, hold no lock, and may call back, but
 *    not end the session.
 * 6. kvb_pool_alloc, _free, _cache and _touch talk to nobody and allocate nothing
 *    while mapped pages last.
 * 7. No C++ exception comes out. NULL where a handle is needed, and a buffer
 *    shorter than its count, are the caller's bugs.
 * 8. Structs only grow, at the end, and begin with their size, by which the
 *    library knows what the program was built with: fields that an older program
 *    has not get their defaults, and are not written to. A program built for a
 *    newer library is told so with KVB_FAILED_PRECONDITION. What exists keeps its
 *    meaning while kvb_abi_version() == KVB_ABI_VERSION.
 * 9. A session is of no use in a process forked after it was opened, nor is
 *    kvb_session_open there: start such processes before, or spawn them. The same
 *    goes for a process forked after a call as an operator.
 */
#ifndef KVBROKER_CLIENT_CAPI_KVBROKER_H_
#define KVBROKER_CLIENT_CAPI_KVBROKER_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define KVB_NOEXCEPT noexcept
extern "C" {
#else
#define KVB_NOEXCEPT
#endif

#define KVB_ABI_VERSION 1
#define KVB_FOREVER INT64_MAX

/* The numbers of google.rpc.Code; what is none of these is KVB_INTERNAL. */
typedef enum kvb_code {
  KVB_OK = 0,
  KVB_INVALID_ARGUMENT = 3,
  KVB_DEADLINE_EXCEEDED = 4,
  KVB_NOT_FOUND = 5,
  KVB_PERMISSION_DENIED = 7,
  KVB_RESOURCE_EXHAUSTED = 8,
  KVB_FAILED_PRECONDITION = 9,
  KVB_INTERNAL = 13,
  KVB_UNAVAILABLE = 14
} kvb_code;

typedef enum kvb_layout {
  KVB_CONTIGUOUS = 1, /* one handle a page, holding all layers */
  KVB_PER_LAYER = 2   /* a handle for each layer's K or V */
} kvb_layout;

typedef enum kvb_urgency {
  KVB_WAITING = 2, /* a request waits: a miss returns at once, and is pursued */
  KVB_RUNNING = 3  /* a request runs: a miss may wait for running_miss_wait_us */
} kvb_urgency;

/* Where another live process of the same tenant has the instance's name. */
typedef enum kvb_name_conflict {
  KVB_JOIN = 0,   /* become a member: one limit over all */
  KVB_SUFFIX = 1, /* take the first of NAME_1, NAME_2 ... that is free */
  KVB_ERROR = 2   /* KVB_FAILED_PRECONDITION, which names the processes */
} kvb_name_conflict;

typedef struct kvb_session_options kvb_session_options;
typedef struct kvb_session kvb_session;
typedef struct kvb_pool kvb_pool;

typedef void (*kvb_callback)(void* context);
typedef void (*kvb_pages_callback)(void* context, uint64_t pages);
typedef void (*kvb_text_callback)(void* context, const char* text);

typedef struct kvb_pool_options {
  size_t size;               /* sizeof(kvb_pool_options) */
  uint64_t handle_bytes;     /* one handle; a multiple of the device's page */
  uint32_t handles_per_page; /* 1 in the contiguous layout */
  int32_t layout;            /* a kvb_layout; an int so that any value is read */
  uint32_t max_pages;         /* slots of the address range; cost nothing */
  uint64_t block_bytes;       /* of one block, all layers together */
  int reserve_null_block;     /* block 0 is backed and never handed out */
  int map_ahead;              /* of need, while there is free memory for it */
  int64_t min_reserved_pages; /* idle pages that are kept, and mapped ahead */
  int64_t max_reserved_pages; /* idle pages kept at most; -1: no limit */
  int64_t idle_decay_ms;      /* idle pages above the reserve go after this */
  /* How long kvb_pool_alloc may wait for others to give; what was granted by then
   * is waited for, up to a second. */
  int64_t running_miss_wait_us;
  int64_t claim_deadline_ms;    /* how long the broker may pursue a miss */
  kvb_callback on_preempt;      /* see kvb_pool_blocks_to_vacate */
  kvb_pages_callback on_closing; /* pages get no new blocks, and empty out */
  kvb_callback on_memory;        /* memory came for a miss: try again */
  void* context;                 /* of the callbacks, each of which may be NULL */
  /* Addresses without a page do not fault: one handle of memory of this process's
   * own, besides what it has declared, lies behind all of them, where writes are
   * lost and reads say nothing. For attention kernels that touch blocks which
   * they do not use. Contiguous layout only. Costs a mapping for each of
   * max_pages when the session opens, and one more with each page that comes or
   * goes. 0 by default. */
  int guard;
  /* Ids of blocks are below this; 0, the default: as many as fit. */
  uint32_t max_blocks;
  /* Who asks kvb_pool_available again and again and takes nothing wants more than
   * that: more pages are mapped each time, up to the limits. For engines that look
   * before they ask, and so never miss. 0 by default. */
  int grow_when_polled;
} kvb_pool_options;

/* Limits of the instance in force, and what the device has to lend, in bytes. */
typedef struct kvb_limits {
  size_t size; /* sizeof(kvb_limits) */
  uint64_t min_bytes;
  uint64_t max_bytes;
  uint64_t capacity_bytes;
} kvb_limits;

/* Bytes of pages: with a used block; with cached blocks only; with neither; on
 * their way; and wished for. */
typedef struct kvb_usage {
  size_t size; /* sizeof(kvb_usage) */
  uint64_t in_use_bytes;
  uint64_t cached_bytes;
  uint64_t idle_bytes;
  uint64_t arriving_bytes;
  uint64_t waiting_bytes;
} kvb_usage;

/* A change of an instance's limits: of the figures that `fields` names. */
typedef enum kvb_policy_field {
  KVB_POLICY_MIN = 1,
  KVB_POLICY_MAX = 2,
  KVB_POLICY_MAX_PERCENT = 4, /* instead of KVB_POLICY_MAX */
  KVB_POLICY_WEIGHT = 8
} kvb_policy_field;
typedef struct kvb_policy {
  size_t size;        /* sizeof(kvb_policy); what is 0 beside it is not set */
  uint32_t fields;    /* kvb_policy_field, added up */
  int preset;         /* also for a name that does not exist yet */
  uint64_t min_bytes; /* guaranteed */
  uint64_t max_bytes; /* the limit; 0 allows no memory at all */
  double max_percent; /* the limit in percent of the instance's own GPU */
  double weight;      /* of what is contended; 1 is the default */
  const char* tenant; /* whose instance, where several have the name, or for a
                       * preset by an administrator; NULL: the only one */
} kvb_policy;

/* Cached content that is gone: that of `generation` and all before. */
typedef struct kvb_removal {
  int32_t block;
  uint32_t generation;
} kvb_removal;

typedef enum kvb_block_state {
  KVB_BLOCK_UNBACKED = 0, /* no memory behind it, or no block of the pool */
  KVB_BLOCK_FREE = 1,
  KVB_BLOCK_USED = 2,
  KVB_BLOCK_CACHED = 3,
  KVB_BLOCK_RESERVED = 4 /* the null block */
} kvb_block_state;

/* What the library speaks; a program wants its own KVB_ABI_VERSION. */
int kvb_abi_version(void) KVB_NOEXCEPT;
void kvb_error_free(char* error) KVB_NOEXCEPT;
/* For results: texts that a function gives to the caller. NULL is fine. */
void kvb_text_free(char* text) KVB_NOEXCEPT;

/* ---- options ---- */

/* `size` is sizeof(kvb_pool_options). The defaults: 1 handle a page, contiguous,
 * map ahead and keep 5 pages, no cap, decay after 30 s, wait 2 ms, 10 s. */
void kvb_pool_options_init(kvb_pool_options* options, size_t size) KVB_NOEXCEPT;

/* `instance`: 1 to 128 of A-Z a-z 0-9 _ . - */
kvb_session_options* kvb_session_options_new(const char* instance) KVB_NOEXCEPT;
void kvb_session_options_free(kvb_session_options* options) KVB_NOEXCEPT;
/* A broker's socket or a directory of sockets; by default KVBROKER_ADDRESS, then
 * the system's and the user's directories. */
void kvb_session_options_set_address(kvb_session_options* options,
                                     const char* address) KVB_NOEXCEPT;
/* kvbrokerd, which is started where there is no broker, and again when it has
 * died, in the user's directory: for the backend "host" where that is set and no
 * GPU, else for the GPU that is named by its uuid. NULL, the default: never; nor
 * with an address, nor where KVBROKER_AUTOSTART is 0, false, no or off. */
void kvb_session_options_set_autostart(kvb_session_options* options,
                                       const char* kvbrokerd_path) KVB_NOEXCEPT;
/* Of several brokers: a device's uuid, a prefix of it, or its index. */
void kvb_session_options_set_gpu(kvb_session_options* options,
                                 const char* gpu) KVB_NOEXCEPT;
/* The kind of memory that is mapped, "host", "cuda" or "cuda_ipc". By default
 * what the broker lends. */
void kvb_session_options_set_backend(kvb_session_options* options,
                                     const char* backend) KVB_NOEXCEPT;
/* Which member of the instance this process is; taken by one at a time. */
void kvb_session_options_set_member(kvb_session_options* options,
                                    const char* member) KVB_NOEXCEPT;
/* A kvb_name_conflict, KVB_JOIN by default. A name that only dying processes have
 * is joined in any case, and another tenant's gets a suffix. */
void kvb_session_options_set_name_conflict(kvb_session_options* options,
                                           int name_conflict) KVB_NOEXCEPT;
/* Limits: in force unless an operator has set others. Fractions: of the device,
 * above 0 and at most 1, where no bytes are set. */
void kvb_session_options_set_min(kvb_session_options* options,
                                 uint64_t bytes) KVB_NOEXCEPT;
void kvb_session_options_set_max(kvb_session_options* options,
                                 uint64_t bytes) KVB_NOEXCEPT;
void kvb_session_options_set_min_fraction(kvb_session_options* options,
                                          double fraction) KVB_NOEXCEPT;
void kvb_session_options_set_max_fraction(kvb_session_options* options,
                                          double fraction) KVB_NOEXCEPT;
void kvb_session_options_set_weight(kvb_session_options* options,
                                    double weight) KVB_NOEXCEPT;
/* What the process needs of the device at its peak besides the pools. */
void kvb_session_options_set_declared_peak(kvb_session_options* options,
                                           uint64_t bytes) KVB_NOEXCEPT;
void kvb_session_options_set_label(kvb_session_options* options,
                                   const char* key,
                                   const char* value) KVB_NOEXCEPT;
/* How long kvb_session_open may take; 10 s by default. */
void kvb_session_options_set_timeout(kvb_session_options* options,
                                     int64_t ms) KVB_NOEXCEPT;
/* An operator ended the session, for the reason in `text`. By default the process
 * ends, with status 86. */
void kvb_session_options_set_on_fenced(kvb_session_options* options,
                                       kvb_text_callback on_fenced,
                                       void* context) KVB_NOEXCEPT;
/* Keeps <directory>/<name in force> from before kvb_session_open returns to the
 * end: 24 bytes, int64 limit, used and preallocated, for programs that read
 * kvcached's. A limit that one of them writes there is set as by
 * kvb_session_set_max. /dev/shm is where they look; NULL, the default: none. What
 * is in the way of it is said on stderr, and the session goes without. */
void kvb_session_options_set_shm_view(kvb_session_options* options,
                                      const char* directory) KVB_NOEXCEPT;
/* Pools are numbered from 0 in the order in which they are added. */
kvb_code kvb_session_options_add_pool(kvb_session_options* options,
                                      const kvb_pool_options* pool,
                                      char** error) KVB_NOEXCEPT;

/* ---- sessions ---- */

/* KVB_NOT_FOUND, KVB_UNAVAILABLE: no broker; KVB_PERMISSION_DENIED: it does not
 * admit this user; KVB_INVALID_ARGUMENT names what is wrong. */
kvb_code kvb_session_open(const kvb_session_options* options,
                          kvb_session** session, char** error) KVB_NOEXCEPT;
/* Ends what waits in the session and its pools, in whatever thread; they hand out no
 * block any more. kvb_session_close comes after. NULL is fine. */
void kvb_session_begin_close(kvb_session* session) KVB_NOEXCEPT;
/* Unmaps and returns everything; its pools are gone. NULL is fine. */
void kvb_session_close(kvb_session* session) KVB_NOEXCEPT;
/* The name in force; differs from the wish where that was another tenant's, or
 * in use and KVB_SUFFIX was wished. */
const char* kvb_session_instance(const kvb_session* session) KVB_NOEXCEPT;
/* Other live processes that had the instance when the session was opened: "12,34",
 * 0 for one that the broker cannot see, "" for none. */
const char* kvb_session_joined_pids(const kvb_session* session) KVB_NOEXCEPT;
/* KVB_OK while the broker is there. Without it the pools live on and do not
 * grow. Where the GPU does not work for this process any more, KVB_INTERNAL says
 * so: no page comes or goes, and the process has to be restarted. */
kvb_code kvb_session_health(kvb_session* session, char** error) KVB_NOEXCEPT;
void kvb_session_limits(kvb_session* session, kvb_limits* limits) KVB_NOEXCEPT;
/* Between the two no page comes or goes, and nothing that the broker says is heard:
 * around the capture of a CUDA graph, which page work in another thread would
 * invalidate. kvb_session_pause waits for what is under way. They nest; who resumes
 * has paused. */
void kvb_session_pause(kvb_session* session) KVB_NOEXCEPT;
void kvb_session_resume(kvb_session* session) KVB_NOEXCEPT;
/* What the process needs of the device at its peak besides the pools, from now on:
 * before it loads weights, or when it needs less. Waits until that much is there.
 * KVB_UNAVAILABLE: it is not within the time, and `error` names the holders. */
kvb_code kvb_session_make_room(kvb_session* session, uint64_t declared_peak,
                               int64_t timeout_ms, char** error) KVB_NOEXCEPT;
/* Sets the limit of the session's instance as an operator does: for all its
 * processes on this GPU, and over what sessions wish. In force, and in
 * kvb_session_limits, when it returns. KVB_UNAVAILABLE: no broker at present. */
kvb_code kvb_session_set_max(kvb_session* session, uint64_t bytes,
                             char** error) KVB_NOEXCEPT;
/* NULL past the last one. */
kvb_pool* kvb_session_pool(kvb_session* session, size_t index) KVB_NOEXCEPT;
/* The ordinal in this process of the GPU whose memory it is; -1: host memory. */
int kvb_session_device(const kvb_session* session) KVB_NOEXCEPT;
/* The name for kvb_session_options_set_gpu of the GPU with this ordinal in this
 * process; to be given to kvb_text_free. KVB_NOT_FOUND: there is none, or no
 * driver. Makes no context. */
kvb_code kvb_gpu_uuid(int ordinal, char** uuid, char** error) KVB_NOEXCEPT;

/* ---- blocks ---- */

/* 1 and `count` ids in `blocks`, or 0 and nothing changed. `urgency`: a
 * kvb_urgency. */
int kvb_pool_alloc(kvb_pool* pool, size_t count, int urgency,
                   int32_t* blocks) KVB_NOEXCEPT;
/* As kvb_pool_alloc, of what is mapped only: never waits, and a miss leaves
 * nothing behind. */
int kvb_pool_try_alloc(kvb_pool* pool, size_t count,
                       int32_t* blocks) KVB_NOEXCEPT;
/* Exactly these blocks, whose pages are asked for where they are not mapped; all or
 * none. *taken is 0 where that cannot be within the time. KVB_INVALID_ARGUMENT:
 * one is in use, cached or none of the pool's. */
kvb_code kvb_pool_alloc_at(kvb_pool* pool, const int32_t* blocks, size_t count,
                           int64_t timeout_ms, int* taken,
                           char** error) KVB_NOEXCEPT;
/* Other blocks on the same pages, while none is in use or cached
 * (KVB_FAILED_PRECONDITION). */
kvb_code kvb_pool_set_blocks(kvb_pool* pool, uint64_t block_bytes,
                             uint32_t max_blocks, int reserve_null_block,
                             char** error) KVB_NOEXCEPT;
/* All or none: KVB_INVALID_ARGUMENT for one that is not in use. */
kvb_code kvb_pool_free(kvb_pool* pool, const int32_t* blocks, size_t count,
                       char** error) KVB_NOEXCEPT;
/* As free, but the contents stay until the memory is needed. */
kvb_code kvb_pool_cache(kvb_pool* pool, const int32_t* blocks, size_t count,
                        char** error) KVB_NOEXCEPT;
/* At most so many blocks are cached, the least recently used go first; -1, the
 * default: as many as there is memory for. */
void kvb_pool_set_max_cached(kvb_pool* pool, int64_t blocks) KVB_NOEXCEPT;
/* 1 and all in use again, if each still has the content of its generation. */
int kvb_pool_touch(kvb_pool* pool, const int32_t* blocks,
                   const uint32_t* generations, size_t count) KVB_NOEXCEPT;
/* Rises each time the block's content is given up. 0 for no block of the pool. */
uint32_t kvb_pool_generation(kvb_pool* pool, int32_t block) KVB_NOEXCEPT;
/* Ids are below this, whatever the limits. */
size_t kvb_pool_block_ids(kvb_pool* pool) KVB_NOEXCEPT;
/* A kvb_block_state. */
int kvb_pool_block_state(kvb_pool* pool, int32_t block) KVB_NOEXCEPT;
/* Blocks in use on the page; 0 where it is not mapped. */
size_t kvb_pool_page_used(kvb_pool* pool, uint32_t page) KVB_NOEXCEPT;
/* How many blocks are in use; the first `count` of them in `blocks`. */
size_t kvb_pool_used_blocks(kvb_pool* pool, int32_t* blocks,
                            size_t count) KVB_NOEXCEPT;
/* Takes out up to `count` events, oldest first; says how many. */
size_t kvb_pool_drain_removals(kvb_pool* pool, kvb_removal* removals,
                               size_t count) KVB_NOEXCEPT;
/* Blocks an alloc would get now, promised ones included; and the most there can
 * be as limits stand. */
size_t kvb_pool_available(kvb_pool* pool) KVB_NOEXCEPT;
size_t kvb_pool_capacity(kvb_pool* pool) KVB_NOEXCEPT;
/* 1 once memory for `count` blocks is mapped, or set aside for a second; 0 where
 * that cannot be within the time. */
int kvb_pool_reserve(kvb_pool* pool, size_t count,
                     int64_t timeout_ms) KVB_NOEXCEPT;
/* Returns all idle pages, the reserve too, but for those that a step keeps; waits
 * up to a second for that. How many pages went. */
uint64_t kvb_pool_trim(kvb_pool* pool) KVB_NOEXCEPT;

/* ---- steps: no block that was free at the begin is taken before the end; no
 * page is unmapped before the steps that may use it are done. Numbers rise ---- */
void kvb_pool_step_begin(kvb_pool* pool) KVB_NOEXCEPT;
void kvb_pool_step_end(kvb_pool* pool, uint64_t scheduled_step) KVB_NOEXCEPT;
void kvb_pool_step_done(kvb_pool* pool, uint64_t completed_step) KVB_NOEXCEPT;

/* Pages whose requests shall be preempted; and their blocks, up to `count`, which
 * are to be freed. Cheap when there are none. */
uint64_t kvb_pool_pages_to_vacate(kvb_pool* pool) KVB_NOEXCEPT;
size_t kvb_pool_blocks_to_vacate(kvb_pool* pool, int32_t* blocks,
                                 size_t count) KVB_NOEXCEPT;

/* ---- memory ---- */

/* Start of the region of a page's handle 0 .. handles_per_page - 1, fixed for the
 * session; NULL past the last. In the contiguous layout block b is at
 * b * block_bytes of region 0; per layer, handle h of page p is at
 * p * handle_bytes of region h. Only what is in use may be touched: anything else
 * may fault. Of CUDA memory it is an address of the GPU, in the primary context. */
void* kvb_pool_region(kvb_pool* pool, size_t handle_of_page) KVB_NOEXCEPT;
/* From one region's start to the next one's, and how long a region is. */
uint64_t kvb_pool_region_bytes(kvb_pool* pool) KVB_NOEXCEPT;
/* Keeps the addresses of all regions from being anybody else's, past the end of the
 * session as well: host memory reads as zeros then, and what is written there is
 * lost; a GPU's must not be touched. To be ended with kvb_range_release. */
typedef struct kvb_range kvb_range;
kvb_range* kvb_pool_retain_range(kvb_pool* pool) KVB_NOEXCEPT;
void kvb_range_release(kvb_range* range) KVB_NOEXCEPT;
/* A CUstream whose work touches the pool: no page is unmapped before what was
 * queued on it is done. To be removed before it is destroyed; NULL is the
 * default stream. Without effect on host memory. */
#define KVB_ALL_STREAMS ((void*)-1) /* whatever runs in the primary context */
void kvb_pool_add_stream(kvb_pool* pool, void* stream) KVB_NOEXCEPT;
void kvb_pool_remove_stream(kvb_pool* pool, void* stream) KVB_NOEXCEPT;
void kvb_pool_usage(kvb_pool* pool, kvb_usage* usage) KVB_NOEXCEPT;

/* ---- as an operator: what kvctl does, without a session. `address` and `gpu`
 * as kvb_session_options_set_address and _set_gpu; NULL: the default, all GPUs.
 * `timeout_ms`: for each broker. KVB_NOT_FOUND: there is no broker, or no such
 * instance; KVB_UNAVAILABLE: nobody listens where a broker was ---- */

/* A JSON array with an object an instance and GPU, what `kvctl list --json`
 * prints; or an object a broker, the fields of BrokerStatus (types.proto) by their
 * names. `*json` is the caller's to free, with kvb_text_free. Where some brokers
 * do not answer it holds what the others said, and code and `error` are those of
 * the first that did not; where none does it is untouched. */
kvb_code kvb_list_instances(const char* address, const char* gpu,
                            int64_t timeout_ms, char** json,
                            char** error) KVB_NOEXCEPT;
kvb_code kvb_list_brokers(const char* address, const char* gpu,
                          int64_t timeout_ms, char** json,
                          char** error) KVB_NOEXCEPT;
/* On each broker that knows `name`; a preset on each. In force for grants when it
 * returns. KVB_FAILED_PRECONDITION: more would be guaranteed than there is. */
kvb_code kvb_set_policy(const char* address, const char* gpu, const char* name,
                        const kvb_policy* policy, int64_t timeout_ms,
                        char** error) KVB_NOEXCEPT;

#ifdef __cplusplus
}
#endif

#endif /* KVBROKER_CLIENT_CAPI_KVBROKER_H_ */
