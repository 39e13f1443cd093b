// Calls of the C library that are on their way.
#pragma once
#include "engine_patches/native/python.h"
enum { KVB_JOIN = 0, KVB_SUFFIX = 1, KVB_ERROR = 2 };
inline void kvb_session_options_set_name_conflict(kvb_session_options*, int) {}
inline void kvb_session_options_set_min_fraction(kvb_session_options*, double) {}
inline void kvb_session_options_set_autostart(kvb_session_options*, const char*) {}
inline const char* kvb_session_joined_pids(const kvb_session*) { return ""; }
