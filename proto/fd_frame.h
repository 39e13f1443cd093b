/* What travels on the descriptor socket (unix, SOCK_SEQPACKET), one struct a
 * packet, in the machine's own byte order (both ends share the machine).
 *
 *   client                                broker
 *     | -- kvb_fd_hello [pidfd] ----------> |  who I am, besides SO_PEERCRED
 *     | <------------- kvb_fd_welcome ----- |  nonce for Open on the gRPC stream
 *     | <--- kvb_fd_frame + descriptors --- |  handles of one grant, in order
 *     | -- kvb_fd_ack --------------------> |  "I hold these now"
 *
 * A packet of another size, magic or type ends the session. Structs only grow at
 * the end and by a new version.
 */
#ifndef KVBROKER_PROTO_FD_FRAME_H_
#define KVBROKER_PROTO_FD_FRAME_H_

#include <stdint.h>

#ifdef __cplusplus
#define KVB_STATIC_ASSERT(condition) static_assert(condition, #condition)
extern "C" {
#else
#define KVB_STATIC_ASSERT(condition) _Static_assert(condition, #condition)
#endif

#define KVB_FD_MAGIC 0x4b564231u /* "KVB1" */
#define KVB_FD_VERSION 1u
/* The kernel's own limit of descriptors in one message (SCM_MAX_FD). */
#define KVB_FD_MAX_PER_FRAME 253u
/* Descriptors a client may leave unacknowledged before the broker waits. */
#define KVB_FD_WINDOW 512u

enum kvb_fd_type {
  KVB_FD_HELLO = 1,
  KVB_FD_WELCOME = 2,
  KVB_FD_FRAME = 3,
  KVB_FD_ACK = 4,
};

/* First in every packet. */
struct kvb_fd_header {
  uint32_t magic;   /* KVB_FD_MAGIC */
  uint16_t version; /* KVB_FD_VERSION */
  uint16_t type;    /* enum kvb_fd_type */
};

/* Client's first packet. May carry one descriptor: a pidfd of the sender, used
 * where the kernel cannot tell the broker (before SO_PEERPIDFD, Linux 6.5). */
struct kvb_fd_hello {
  struct kvb_fd_header header;
  uint32_t pid;      /* as the client sees itself; for people only */
  uint32_t reserved; /* 0 */
};

/* Broker's answer. Presenting the nonce in Open, from a connection of the same
 * uid and process, joins the two sockets into one session. Good once. */
struct kvb_fd_welcome {
  struct kvb_fd_header header;
  uint8_t nonce[16];
  uint64_t incarnation; /* of the broker; changes with each start */
};

/* Carries `handle_count` descriptors: the handles with ordinals first_handle,
 * first_handle + 1, ... of the grant. A grant's handles are numbered through its
 * pages in the order of Granted.pages, handles_per_page for each. Frames of one
 * grant may come in any order, and before or after its Granted. */
struct kvb_fd_frame {
  struct kvb_fd_header header;
  uint64_t grant_id;
  uint32_t first_handle;
  uint32_t handle_count; /* 1 .. KVB_FD_MAX_PER_FRAME */
};

/* Client holds the descriptors of a frame; opens the broker's window again. */
struct kvb_fd_ack {
  struct kvb_fd_header header;
  uint64_t grant_id;
  uint32_t handle_count; /* as in the frame */
  uint32_t reserved;     /* 0 */
};

KVB_STATIC_ASSERT(sizeof(struct kvb_fd_header) == 8);
KVB_STATIC_ASSERT(sizeof(struct kvb_fd_hello) == 16);
KVB_STATIC_ASSERT(sizeof(struct kvb_fd_welcome) == 32);
KVB_STATIC_ASSERT(sizeof(struct kvb_fd_frame) == 24);
KVB_STATIC_ASSERT(sizeof(struct kvb_fd_ack) == 24);

#ifdef __cplusplus
}
#endif

#endif /* KVBROKER_PROTO_FD_FRAME_H_ */
