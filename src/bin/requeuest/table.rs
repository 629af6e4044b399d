//! Columns for a person to read.

use std::fmt::Write as _;

use crate::out::Style;
use crate::text;

/// Rows of cells, each column as wide as its widest cell.
pub(crate) struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
}

/// A cell's text, without control characters, and how it looks.
pub(crate) struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    pub(crate) fn new(text: impl AsRef<str>) -> Self {
        Self::styled(text, Style::Plain)
    }

    pub(crate) fn styled(text: impl AsRef<str>, style: Style) -> Self {
        let text = text::line(text.as_ref());
        Self { text, style }
    }

    /// At most this many characters of it.
    pub(crate) fn short(text: impl AsRef<str>, longest: usize) -> Self {
        Self::new(text::shortened(&text::line(text.as_ref()), longest))
    }
}

impl<T: AsRef<str>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text)
    }
}

impl Table {
    pub(crate) fn new<const N: usize>(header: [&'static str; N]) -> Self {
        Self {
            header: header.to_vec(),
            rows: Vec::new(),
        }
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [Cell; N]) {
        debug_assert_eq!(N, self.header.len());
        self.rows.push(cells.into());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The lines, of which none ends in spaces.
    pub(crate) fn shown(&self, has_color: bool) -> String {
        let widths: Vec<usize> = (0..self.header.len())
            .map(|column| {
                let cells = self.rows.iter().map(|row| row[column].text.chars().count());
                cells.fold(self.header[column].len(), usize::max)
            })
            .collect();
        let mut shown = String::new();
        let header = self.header.iter().map(|name| (*name, Style::Faint));
        line(&mut shown, header, &widths, has_color);
        for row in &self.rows {
            let cells = row.iter().map(|cell| (&*cell.text, cell.style));
            line(&mut shown, cells, &widths, has_color);
        }
        shown
    }
}

fn line<'a>(
    shown: &mut String,
    cells: impl Iterator<Item = (&'a str, Style)>,
    widths: &[usize],
    has_color: bool,
) {
    let mut gap = 0;
    for (column, (text, style)) in cells.enumerate() {
        if column > 0 {
            gap += 2;
        }
        if !text.is_empty() {
            let _ = write!(shown, "{:gap$}{}", "", style.paint(text, has_color));
            gap = 0;
        }
        gap += widths[column] - text.chars().count();
    }
    shown.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cells() {
        let mut table = Table::new(["id", "error"]);
        table.row(["a".into(), "x\ny".into()]);
        table.row([Cell::styled("long", Style::Bad), "".into()]);
        assert_eq!(table.shown(false), "id    error\na     x\\ny\nlong\n");
        assert!(table.shown(true).contains("\u{1b}[31mlong\u{1b}[0m"));
    }
}
