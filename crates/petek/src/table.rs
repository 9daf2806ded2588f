//! Tables: a head, a row per thing, columns that line up; nothing that `grep` and `awk` stumble over.

use comfy_table::{Cell, CellAlignment, Table, presets};

use crate::output::Shown;

/// A column.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Column {
    /// Words, from the left.
    Words(&'static str),
    /// Numbers, by their last digit.
    Numbers(&'static str),
}

/// The table as lines, without a line break at its end. A cell without text is a dash, so that every row has as
/// many words as the head has names.
pub(crate) fn table<const N: usize>(
    columns: [Column; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let cell = |(column, text): (&Column, String)| match column {
        Column::Words(_) => Cell::new(text),
        Column::Numbers(_) => Cell::new(text).set_alignment(CellAlignment::Right),
    };
    let names = columns.iter().map(|column| match column {
        Column::Words(name) | Column::Numbers(name) => (*name).to_owned(),
    });
    table.set_header(columns.iter().zip(names).map(cell));
    for row in rows {
        let texts = row.into_iter().map(|text| match text.is_empty() {
            true => "-".to_owned(),
            false => Shown { text: &text, kept: &[] }.to_string(),
        });
        table.add_row(columns.iter().zip(texts).map(cell));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}
