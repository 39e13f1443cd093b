#include "client/cli/table.h"

#include "gtest/gtest.h"

namespace kvbroker::cli {
namespace {

TEST(TableTest, AlignsColumnsWithoutTrailingBlanks) {
  Table table({{"NAME"}, {"SIZE", Align::kRight}, {"NOTE"}});
  table.AddRow({"conv", "1 GiB", ""});
  table.AddRow({"a-longer-name", "512 MiB", "yes"});
  EXPECT_EQ(table.Render(/*color=*/false),
            "NAME              SIZE  NOTE\n"
            "conv             1 GiB\n"
            "a-longer-name  512 MiB  yes\n");
}

TEST(TableTest, ColoursTakeNoWidth) {
  Table table({{"%", Align::kRight}, {"NAME"}});
  table.AddRow({{"90 %", Color::kRed}, "conv"});
  table.AddRow({{"5 %", Color::kGreen}, "code"});
  EXPECT_EQ(table.Render(/*color=*/true),
            "   %  NAME\n"
            "\x1b[31m90 %\x1b[0m  conv\n"
            " \x1b[32m5 %\x1b[0m  code\n");
  EXPECT_EQ(table.Render(/*color=*/false).find('\x1b'), std::string::npos);
}

}  // namespace
}  // namespace kvbroker::cli
