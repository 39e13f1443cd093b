// Table: rows of text in aligned columns, for a terminal.
#ifndef KVBROKER_CLIENT_CLI_TABLE_H_
#define KVBROKER_CLIENT_CLI_TABLE_H_

#include <string>
#include <utility>
#include <vector>

namespace kvbroker::cli {

enum class Align { kLeft, kRight };
enum class Color { kNone, kGreen, kYellow, kRed };

class Table {
 public:
  struct Column {
    std::string title;
    Align align = Align::kLeft;
  };
  struct Cell {
    // Implicit: most cells are just text.
    Cell(std::string text, Color color = Color::kNone)  // NOLINT
        : text(std::move(text)), color(color) {}
    Cell(const char* text, Color color = Color::kNone)  // NOLINT
        : text(text), color(color) {}
    std::string text;
    Color color;
  };

  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

  // REQUIRES: as many cells as columns.
  void AddRow(std::vector<Cell> row) { rows_.push_back(std::move(row)); }

  // The titles and all rows, one line each, no blanks at the ends. Colours are
  // terminal sequences; without `color`, plain text.
  std::string Render(bool color) const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<Cell>> rows_;
};

}  // namespace kvbroker::cli

#endif  // KVBROKER_CLIENT_CLI_TABLE_H_
