// Calls of the C library that are on their way.
#pragma once
#include "engine_patches/native/python.h"
enum { KVB_JOIN = 0, KVB_SUFFIX = 1, KVB_ERROR = 2 };
inline void kvb_session_options_set_name_conflict(kvb_session_options*, int) {}
inline void kvb_session_options_set_min_fraction(kvb_session_options*, double) {}
inline void kvb_session_options_set_autostart(kvb_session_options*, const char*) {}
inline void kvb_session_options_set_shm_view(kvb_session_options*, const char*) {}
inline const char* kvb_session_joined_pids(const kvb_session*) { return ""; }
inline kvb_code kvb_session_set_max(kvb_session*, uint64_t, char**) { return KVB_UNAVAILABLE; }
inline kvb_code kvb_list_instances(const char*, const char*, int64_t, char**, char**) { return KVB_UNAVAILABLE; }
inline kvb_code kvb_list_brokers(const char*, const char*, int64_t, char**, char**) { return KVB_UNAVAILABLE; }
inline void kvb_text_free(char* text) { kvb_error_free(text); }
