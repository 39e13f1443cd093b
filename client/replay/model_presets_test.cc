#include "client/replay/model_presets.h"

#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace kvbroker::replay {
namespace {

KvGeometry Geometry(std::string_view model, int64_t scale) {
  return *ScaledGeometry(*FindModelPreset(model), scale);
}

TEST(ModelPresetsTest, FullSizeFiguresOfKnownModels) {
  EXPECT_EQ(Geometry("llama-3.1-8b", 1).token_bytes, KiB(128));
  EXPECT_EQ(Geometry("llama-3.1-8b", 1).page_bytes, MiB(128));
  EXPECT_EQ(Geometry("llama-3.1-8b", 1).block_bytes, MiB(2));
  EXPECT_EQ(Geometry("qwen3-0.6b", 1).page_bytes, MiB(112));
  EXPECT_EQ(Geometry("qwen3-4b", 1).page_bytes, MiB(144));
  EXPECT_EQ(Geometry("llama-3.1-70b", 1).page_bytes, MiB(320));
}

TEST(ModelPresetsTest, ScaleDividesBytes) {
  const KvGeometry geometry = Geometry("llama-3.1-8b", 512);
  EXPECT_EQ(geometry.token_bytes, Bytes(256));
  EXPECT_EQ(geometry.block_bytes, KiB(4));
  EXPECT_EQ(geometry.page_bytes, KiB(256));
}

TEST(ModelPresetsTest, EveryModelWorksAtTheDefaultScale) {
  for (const ModelPreset& model : ModelPresets()) {
    const auto geometry = ScaledGeometry(model, kDefaultScale);
    ASSERT_TRUE(geometry.ok()) << geometry.status();
    EXPECT_EQ(geometry->page_bytes.count() % 4096, 0) << model.name;
    EXPECT_EQ(geometry->block_bytes.count() % 64, 0) << model.name;
  }
}

TEST(ModelPresetsTest, UnknownModelListsTheKnown) {
  const auto model = FindModelPreset("gpt-9");
  ASSERT_FALSE(model.ok());
  EXPECT_TRUE(absl::StrContains(model.status().message(),
                                "gpt-9; known: llama-3.1-8b, "));
}

TEST(ModelPresetsTest, ScalesThatDoNotDivideAreRefused) {
  const ModelPreset model = *FindModelPreset("qwen3-0.6b");
  for (int64_t scale :
       {int64_t{0}, int64_t{-1}, int64_t{3}, int64_t{1} << 40}) {
    EXPECT_FALSE(ScaledGeometry(model, scale).ok()) << scale;
  }
  const auto page = ScaledGeometry(model, 1 << 14);
  ASSERT_FALSE(page.ok());
  EXPECT_TRUE(absl::StrContains(page.status().message(), "multiple of 4096"));
}

}  // namespace
}  // namespace kvbroker::replay
