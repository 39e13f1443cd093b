"""A fuzz target, built in two ways."""

def fuzz_target(name, deps, mutations, tags = []):
    """NAME_fuzz.cc, which defines LLVMFuzzerTestOneInput, and corpus/NAME.

    NAME_fuzz is a libFuzzer program, for `--config=fuzz` only (run.sh);
    NAME_fuzz_test an ordinary test, in every build: the corpus and seeded
    mutations of it.

    Args:
      name: of the target, and of its folder of seeds.
      deps: of the source.
      mutations: how many the test runs, so that it takes about a second.
      tags: of the test.
    """
    source = name + "_fuzz.cc"
    corpus = native.glob(["corpus/%s/**" % name])
    native.cc_binary(
        name = name + "_fuzz",
        testonly = True,
        srcs = [source],
        linkopts = ["-fsanitize=fuzzer"],
        tags = ["manual"],
        deps = deps + [":fuzz_input"],
    )
    native.cc_test(
        name = name + "_fuzz_test",
        size = "small",
        srcs = [source],
        args = [
            "--mutations=%d" % mutations,
            "%s/corpus/%s" % (native.package_name(), name),
        ],
        data = corpus,
        tags = tags,
        deps = deps + [
            ":fuzz_input",
            ":standalone_main",
        ],
    )
