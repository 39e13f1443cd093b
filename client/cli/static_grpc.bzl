"""Links gRPC into kvctl instead of loading it.

A control plane starts kvctl for each change of a limit. Measured with a client
that makes one call and ends (2 cores, medians): 21 to 23 ms with shared objects,
13 ms of it with no call at all; 5 to 8 ms linked in, 2 ms of it with no call.
The "unsecure" build is gRPC without TLS: kvctl speaks over unix sockets only.

The flags stand before those of @system//:grpc++, whose --as-needed then finds
nothing left to load.
"""

_ABSL = [
    "bad_optional_access",
    "bad_variant_access",
    "base",
    "city",
    "civil_time",
    "cord",
    "cord_internal",
    "cordz_functions",
    "cordz_handle",
    "cordz_info",
    "debugging_internal",
    "demangle_internal",
    "exponential_biased",
    "graphcycles_internal",
    "hash",
    "hashtablez_sampler",
    "int128",
    "log_severity",
    "low_level_hash",
    "malloc_internal",
    "random_internal_platform",
    "random_internal_pool_urbg",
    "random_internal_randen",
    "random_internal_randen_hwaes",
    "random_internal_randen_hwaes_impl",
    "random_internal_randen_slow",
    "random_internal_seed_material",
    "random_seed_gen_exception",
    "raw_hash_set",
    "raw_logging_internal",
    "spinlock_wait",
    "stacktrace",
    "status",
    "statusor",
    "str_format_internal",
    "strerror",
    "strings",
    "strings_internal",
    "symbolize",
    "synchronization",
    "throw_delegate",
    "time",
    "time_zone",
]

_ARCHIVES = [
    "grpc++_unsecure",
    "grpc_unsecure",
    "gpr",
    "upb",
    "address_sorting",
    "re2",
    "cares",
    "z",
    "protobuf",
] + ["absl_" + name for name in _ABSL]

STATIC_GRPC_LINKOPTS = [
    # Debian's archives are not position independent.
    "-no-pie",
    "-Wl,--push-state,-Bstatic,--start-group",
] + ["-l" + name for name in _ARCHIVES] + [
    "-Wl,--end-group,--pop-state",
]
