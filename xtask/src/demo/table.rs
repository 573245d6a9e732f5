//! Plain tables: columns as wide as their widest cell, numbers to the right.

/// Prints `rows` under `head`, indented.
pub(super) fn print(head: &[&str], rows: &[Vec<String>]) {
    for line in lines(head, rows) {
        println!("    {line}");
    }
}

fn lines(head: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let width = |column: usize| {
        let cells = rows.iter().chain([&head]).filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let line = |row: &Vec<String>| {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let width = width(column);
            if column > 0 && cell.starts_with(|c: char| c.is_ascii_digit()) {
                format!("{cell:>width$}")
            } else {
                format!("{cell:<width$}")
            }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    std::iter::once(&head).chain(rows).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["web-1".to_owned(), "7".to_owned()], vec!["x".to_owned(), "100".to_owned()]];
        assert_eq!(lines(&["pod", "answers"], &rows), ["pod    answers", "web-1        7", "x          100"]);
    }
}
