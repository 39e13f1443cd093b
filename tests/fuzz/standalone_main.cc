// Runs a fuzz target without a fuzzer, as an ordinary test: every file of its
// corpus, then seeded mutations of them. The same seed gives the same run.
//
//   core_fuzz_test [--mutations=N] [--seed=N] FILE_OR_FOLDER...
//
// An input that makes the target crash is written to the file that stderr
// names before; run it again by giving that file alone with --mutations=0.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
// There in a build with sanitizers, whose reports end the process otherwise
// than by a signal.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(
    void (*callback)());

namespace {

constexpr size_t kMaxSize = 4096;  // as libFuzzer's

using Input = std::vector<uint8_t>;

// The input being run, for the handler below.
const Input* g_running = nullptr;
char g_crash_path[4096];

// The process is about to end, so what is not async-signal-safe here can only
// spoil the report.
void KeepInput() {
  const Input* input = std::exchange(g_running, nullptr);
  if (input == nullptr) return;
  FILE* file = std::fopen(g_crash_path, "wb");
  if (file == nullptr) return;
  std::fwrite(input->data(), 1, input->size(), file);
  std::fclose(file);
  std::fprintf(stderr, "the input that failed: %s\n", g_crash_path);
}

void OnSignal(int number) {
  KeepInput();
  signal(number, SIG_DFL);
  raise(number);
}

void Run(const Input& input) {
  g_running = &input;
  LLVMFuzzerTestOneInput(input.data(), input.size());
  g_running = nullptr;
}

// One or several small changes, as a fuzzer makes them.
class Mutator {
 public:
  Mutator(const std::vector<Input>& corpus, uint64_t seed)
      : corpus_(corpus), random_(seed) {}

  Input Next() {
    Input input = Any();
    for (size_t changes = 1 + Below(6); changes > 0; --changes) Change(input);
    if (input.size() > kMaxSize) input.resize(kMaxSize);
    return input;
  }

 private:
  size_t Below(size_t below) { return random_() % below; }
  const Input& Any() { return corpus_[Below(corpus_.size())]; }

  void Change(Input& input) {
    if (input.empty()) input.push_back(0);
    uint8_t& byte = input[Below(input.size())];
    const auto at = [&] {
      return input.begin() + static_cast<ptrdiff_t>(Below(input.size()));
    };
    switch (Below(8)) {
      case 0:
        byte ^= static_cast<uint8_t>(1 << Below(8));
        break;
      case 1:
        byte = static_cast<uint8_t>(random_());
        break;
      case 2:
        byte = static_cast<uint8_t>(byte + (Below(2) == 0 ? 1 : -1));
        break;
      case 3: {  // a value at an edge
        static constexpr uint8_t kEdges[] = {0, 1, 0x7f, 0x80, 0xff, '\n'};
        byte = kEdges[Below(std::size(kEdges))];
        break;
      }
      case 4:
        input.insert(at(), static_cast<uint8_t>(random_()));
        break;
      case 5: {  // less
        const size_t first = Below(input.size());
        const size_t last = std::min(input.size(), first + 1 + Below(16));
        input.erase(input.begin() + static_cast<ptrdiff_t>(first),
                    input.begin() + static_cast<ptrdiff_t>(last));
        break;
      }
      case 6: {  // a piece of another
        const Input& other = Any();
        if (other.empty()) break;
        const size_t first = Below(other.size());
        const size_t last = std::min(other.size(), first + 1 + Below(64));
        input.insert(at(), other.begin() + static_cast<ptrdiff_t>(first),
                     other.begin() + static_cast<ptrdiff_t>(last));
        break;
      }
      case 7: {  // a piece once more
        const size_t first = Below(input.size());
        const size_t last = std::min(input.size(), first + 1 + Below(64));
        const Input piece(input.begin() + static_cast<ptrdiff_t>(first),
                          input.begin() + static_cast<ptrdiff_t>(last));
        input.insert(at(), piece.begin(), piece.end());
        break;
      }
    }
  }

  const std::vector<Input>& corpus_;
  std::mt19937_64 random_;
};

std::vector<std::filesystem::path> FilesIn(const std::string& path) {
  namespace fs = std::filesystem;
  std::vector<fs::path> files;
  if (!fs::is_directory(path)) return {path};
  for (const auto& entry : fs::recursive_directory_iterator(path)) {
    if (entry.is_regular_file()) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());  // the same run everywhere
  return files;
}

bool TakeFlag(std::string_view argument, std::string_view name,
              uint64_t& value) {
  if (!argument.starts_with(name)) return false;
  value = std::strtoull(argument.data() + name.size(), nullptr, 10);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t mutations = 3000, seed = 1;
  std::vector<Input> corpus;
  for (int i = 1; i < argc; ++i) {
    if (TakeFlag(argv[i], "--mutations=", mutations) ||
        TakeFlag(argv[i], "--seed=", seed)) {
      continue;
    }
    for (const std::filesystem::path& path : FilesIn(argv[i])) {
      std::ifstream file(path, std::ios::binary);
      if (!file) {
        std::fprintf(stderr, "cannot read %s\n", path.c_str());
        return 2;
      }
      corpus.emplace_back(std::istreambuf_iterator<char>(file),
                          std::istreambuf_iterator<char>());
    }
  }
  if (corpus.empty()) {
    std::fprintf(stderr, "usage: %s [--mutations=N] [--seed=N] CORPUS...\n",
                 argv[0]);
    return 2;
  }
  const char* folder = std::getenv("TEST_UNDECLARED_OUTPUTS_DIR");
  std::snprintf(g_crash_path, sizeof(g_crash_path), "%s/crash-%d",
                folder != nullptr ? folder : "/tmp", getpid());
  for (int number : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) {
    signal(number, OnSignal);
  }
  if (__sanitizer_set_death_callback != nullptr) {
    __sanitizer_set_death_callback(KeepInput);
  }

  for (const Input& input : corpus) Run(input);
  Mutator mutator(corpus, seed);
  for (uint64_t i = 0; i < mutations; ++i) Run(mutator.Next());
  std::printf("%zu files and %llu mutations, seed %llu\n", corpus.size(),
              static_cast<unsigned long long>(mutations),
              static_cast<unsigned long long>(seed));
  return 0;
}
