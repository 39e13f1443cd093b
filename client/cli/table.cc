#include "client/cli/table.h"

#include <algorithm>

namespace kvbroker::cli {
namespace {

const char* StartOf(Color color) {
  switch (color) {
    case Color::kGreen:
      return "\x1b[32m";
    case Color::kYellow:
      return "\x1b[33m";
    case Color::kRed:
      return "\x1b[31m";
    case Color::kNone:
      break;
  }
  return "";
}

}  // namespace

std::string Table::Render(bool color) const {
  std::vector<size_t> widths;
  for (size_t i = 0; i < columns_.size(); ++i) {
    size_t width = columns_[i].title.size();
    for (const auto& row : rows_) width = std::max(width, row[i].text.size());
    widths.push_back(width);
  }

  std::string out;
  auto add_line = [&](auto cell_of) {
    // Blanks are written only once something follows them.
    size_t pending = 0;
    for (size_t i = 0; i < columns_.size(); ++i) {
      const Cell& cell = cell_of(i);
      size_t padding = widths[i] - cell.text.size();
      bool right = columns_[i].align == Align::kRight;
      if (i > 0) pending += 2;
      if (right) pending += padding;
      if (!cell.text.empty()) {
        bool painted = color && cell.color != Color::kNone;
        out.append(pending, ' ');
        if (painted) out += StartOf(cell.color);
        out += cell.text;
        if (painted) out += "\x1b[0m";
        pending = 0;
      }
      if (!right) pending += padding;
    }
    out += '\n';
  };
  add_line([&](size_t i) { return Cell(columns_[i].title); });
  for (const auto& row : rows_) {
    add_line([&](size_t i) -> const Cell& { return row[i]; });
  }
  return out;
}

}  // namespace kvbroker::cli
