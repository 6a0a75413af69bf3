"""CSV as people write it: any delimiter, quotes, line ends in cells, odd names; against the standard library."""

from __future__ import annotations

import csv
import io
import random

import pytest

from tunesmith.data.csvfile import csv_rows
from tunesmith.data.files import DataFile
from tunesmith.data.records import read_records
from tunesmith.data.rows import BadRow, Row
from tunesmith.errors import DataError


def _read(tmp_path, text: str | bytes, name: str = "a.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(csv_rows(DataFile.at(path)))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_what_the_standard_library_writes_is_read_back(delimiter, tmp_path):
    rng = random.Random(3)
    alphabet = "ab ä€\"\n,;\t|'x"
    header = ["Frage, bitte", "Antwort; ja", "größe"]
    rows = [["".join(rng.choices(alphabet, k=rng.randint(1, 12))) for _ in header] for _ in range(300)]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    writer.writerows([header, *rows])
    read = _read(tmp_path, out.getvalue())
    assert all(isinstance(row, Row) for row in read)
    assert [list(row.values.values()) for row in read] == rows and list(read[0].values) == header


def test_a_file_nobody_has_seen(tmp_path):
    text = (
        '\ufeffKundenfrage (Deutsch);"Unsere ""Antwort""";Nr.\n'
        'Wie groß ist die Straße?;"Drei Meter; ""ungefähr"".";1\n'
        '"Öffnen Sie\nauch sonntags?";Nein, leider nicht.;2\n' * 4
    )
    path = tmp_path / "Meine Daten.csv"
    path.write_text(text, encoding="utf-8")
    records = read_records(path, stage="sft")
    assert dict(records.columns) == {"question": "Kundenfrage (Deutsch)", "answer": 'Unsere "Antwort"'}
    first, second = list(records)[:2]
    assert first.messages[1].content == 'Drei Meter; "ungefähr".' and second.messages[0].content.count("\n") == 1


def test_labels_are_found_by_what_they_look_like(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("lfd;Kommentar des Gastes;Urteil\n" + "".join(
        f"{n};Das Essen war Nummer {n};{'gut' if n % 2 else 'schlecht'}\n" for n in range(12)))  # fmt: skip
    records = read_records(path, stage="classify")
    assert dict(records.columns) == {"text": "Kommentar des Gastes", "label": "Urteil"}
    assert {record.label for record in records} == {"gut", "schlecht"}


def test_the_row_number_that_pandas_writes_is_no_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(",review,sentiment\n" + "".join(f"{n},text {n},{n % 2}\n" for n in range(10)))
    assert dict(read_records(path, stage="classify").columns) == {"text": "review", "label": "sentiment"}


def test_cells_may_be_longer_than_the_standard_library_allows(tmp_path):
    rows = _read(tmp_path, f"a,b\n{'x' * 200_000},y\n")
    assert len(rows[0].values["a"]) == 200_000


def test_a_row_with_other_than_that_many_cells_is_bad_and_the_next_is_read(tmp_path):
    rows = _read(tmp_path, 'a,b\n1,2,3\n1\n"x"y,2\n1,2\n')
    assert [type(row) for row in rows] == [BadRow, BadRow, BadRow, Row]
    assert [row.origin.rpartition(":")[2] for row in rows] == ["2", "3", "4", "5"]
    assert "text after a closing quote" in rows[2].problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,a,b\n1,2,3\n", "names a twice"),
        ("a,,b\n1,2,3\n", "a column without a name"),
        ('a,b\n1,"2\n3,4\n', ":2: a quote is opened and never closed"),
        ("a,b\r1,2\r3,4\r", "a carriage return alone"),
    ],
)
def test_a_structure_that_is_in_doubt_is_refused(text, said, tmp_path):
    with pytest.raises(DataError, match=said):
        _read(tmp_path, text)


def test_quotes_may_stand_after_spaces(tmp_path):
    rows = _read(tmp_path, 'a, b\n"x, y", "z ""w"" "\n 1,  2\n')
    assert [dict(row.values) for row in rows] == [{"a": "x, y", "b": 'z "w" '}, {"a": " 1", "b": "  2"}]


def test_one_column_needs_no_delimiter(tmp_path):
    rows = _read(tmp_path, 'text\nhello\n"a, b"\n')
    assert [row.values["text"] for row in rows] == ["hello", "a, b"]
