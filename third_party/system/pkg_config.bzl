"""A repository whose link flags come from pkg-config.

The build file stays an ordinary file; it loads LINKOPTS, one list of flags a
key of `modules`, from the generated linkopts.bzl. Headers are in /usr/include,
where the compiler looks anyhow and warns about nothing; those in folders below it
are found with COPTS, one list a key of `headers`, by whoever includes them.
"""

def _link_flags(repository_ctx, modules):
    result = repository_ctx.execute(["pkg-config", "--libs"] + modules)
    if result.return_code != 0:
        fail("pkg-config does not know %s (deploy/install_deps.sh installs them):\n%s" %
             (", ".join(modules), result.stderr))

    # gRPC alone names the same libraries several times over. All but GoogleTest
    # are shared objects, so the order of what is left does not matter.
    unique = {flag: True for flag in result.stdout.strip().split(" ") if flag}

    # Needed ones only, or each program would load sixty Abseil libraries.
    return ["-Wl,--as-needed"] + unique.keys() if unique else []

def _compile_flags(repository_ctx, modules):
    result = repository_ctx.execute(["pkg-config", "--cflags"] + modules)
    if result.return_code != 0:
        fail("pkg-config does not know %s (deploy/install_deps.sh installs them):\n%s" %
             (", ".join(modules), result.stderr))
    return [
        flag.replace("-I", "-isystem", 1)
        for flag in result.stdout.strip().split(" ")
        if flag
    ]

def _pkg_config_repository_impl(repository_ctx):
    linkopts = {
        name: _link_flags(repository_ctx, modules)
        for name, modules in repository_ctx.attr.modules.items()
    }
    copts = {
        name: _compile_flags(repository_ctx, modules)
        for name, modules in repository_ctx.attr.headers.items()
    }
    repository_ctx.file(
        "linkopts.bzl",
        "LINKOPTS = %s\nCOPTS = %s\n" % (linkopts, copts),
    )
    repository_ctx.symlink(repository_ctx.attr.build_file, "BUILD.bazel")

pkg_config_repository = repository_rule(
    implementation = _pkg_config_repository_impl,
    attrs = {
        "build_file": attr.label(mandatory = True, allow_single_file = True),
        "headers": attr.string_list_dict(
            doc = "Name in COPTS to the pkg-config modules it stands for.",
        ),
        "modules": attr.string_list_dict(
            doc = "Name in LINKOPTS to the pkg-config modules it stands for.",
            mandatory = True,
        ),
    },
    environ = ["PKG_CONFIG_PATH"],
    local = True,
)
