"""kvb_proto_library: C++ message and gRPC libraries from .proto files.

Uses Debian's protoc and gRPC plugin. Imports are by path from the repository
root: `import "proto/kvbroker/v1/types.proto";`.
"""

def _sibling(label, suffix):
    """The label of the target named like `label`'s with `suffix` added."""
    if ":" in label:
        return label + suffix
    if label.startswith("//") or label.startswith("@"):
        return "%s:%s%s" % (label, label.rpartition("/")[2], suffix)
    return ":" + label + suffix

def _outputs(srcs, endings):
    return [src[:-len(".proto")] + ending for src in srcs for ending in endings]

def _protoc(name, srcs, imports, outs, flags, visibility):
    native.genrule(
        name = name,
        srcs = srcs + imports,
        outs = outs,
        cmd = "/usr/bin/protoc -I. -I/usr/include %s %s" % (
            flags,
            " ".join(["$(location %s)" % src for src in srcs]),
        ),
        message = "Generating C++ from",
        visibility = visibility,
    )

def kvb_proto_library(name, srcs, deps = [], grpc = False, visibility = None):
    """Messages as `name`; with `grpc`, stubs as `name_grpc` and mocks as `name_grpc_mock`.

    Args:
      name: the message library; it links protobuf and not gRPC.
      srcs: .proto files of this package.
      deps: the kvb_proto_library targets that own what srcs import; the
        well-known google/protobuf/*.proto need none.
      grpc: whether srcs hold services.
      visibility: of all libraries made here.
    """
    imports = [_sibling(dep, "_protos") for dep in deps]
    private = ["//visibility:private"]

    native.filegroup(
        name = name + "_protos",
        srcs = srcs + imports,
        visibility = visibility,
    )

    _protoc(
        name = name + "_protoc",
        srcs = srcs,
        imports = imports,
        outs = _outputs(srcs, [".pb.h", ".pb.cc"]),
        flags = "--cpp_out=$(GENDIR)",
        visibility = private,
    )
    native.cc_library(
        name = name,
        srcs = _outputs(srcs, [".pb.cc"]),
        hdrs = _outputs(srcs, [".pb.h"]),
        copts = ["-w"],  # Generated: its warnings are not ours to fix.
        visibility = visibility,
        deps = deps + ["@system//:protobuf"],
    )
    if not grpc:
        return

    _protoc(
        name = name + "_grpc_protoc",
        srcs = srcs,
        imports = imports,
        outs = _outputs(srcs, [".grpc.pb.h", ".grpc.pb.cc", "_mock.grpc.pb.h"]),
        flags = "--plugin=protoc-gen-grpc=/usr/bin/grpc_cpp_plugin " +
                "--grpc_out=generate_mock_code=true:$(GENDIR)",
        visibility = private,
    )
    native.cc_library(
        name = name + "_grpc",
        srcs = _outputs(srcs, [".grpc.pb.cc"]),
        hdrs = _outputs(srcs, [".grpc.pb.h"]),
        copts = ["-w"],
        visibility = visibility,
        deps = [
            ":" + name,
            "@system//:grpc++",
        ],
    )
    native.cc_library(
        name = name + "_grpc_mock",
        testonly = True,
        hdrs = _outputs(srcs, ["_mock.grpc.pb.h"]),
        visibility = visibility,
        deps = [
            ":" + name + "_grpc",
            "@system//:gmock",
        ],
    )
