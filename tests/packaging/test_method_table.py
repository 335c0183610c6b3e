"""``python -m transfuse.methods``: the table in a document, and the check that it is fresh."""

from __future__ import annotations

from pathlib import Path

import pytest

import transfuse.methods as methods
from transfuse.methods.__main__ import BEGIN, END, main, replace_table

README = Path(__file__).resolve().parents[2] / "README.md"


def test_table_has_one_row_per_method():
    header, rule, *rows = methods.table().splitlines()
    assert header == "| method | domain | kind | ops used | paper |"
    assert len(rows) == len(methods.list())
    assert all(line.count(" | ") == 4 for line in (header, rule, *rows))
    row = next(line for line in rows if line.startswith("| `style_injection` |"))
    assert "`attend`, `adain`" in row
    assert "https://arxiv.org/abs/2312.09008" in row


def test_check_and_write(tmp_path, capsys):
    document = tmp_path / "README.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    assert main(["--table", "--check", str(document)]) == 1
    assert "stale" in capsys.readouterr().err
    assert main(["--table", "--write", str(document)]) == 0
    assert main(["--table", "--check", str(document)]) == 0
    text = document.read_text(encoding="utf-8")
    assert text == f"before\n{BEGIN}\n{methods.table()}{END}\nafter\n"
    assert replace_table(text, methods.table()) == text


@pytest.mark.parametrize(
    "text", ["no markers\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n"]
)
def test_documents_without_proper_markers_are_refused(tmp_path, capsys, text):
    document = tmp_path / "README.md"
    document.write_text(text, encoding="utf-8")
    assert main(["--check", str(document)]) == 2
    assert "once each" in capsys.readouterr().err
    assert document.read_text(encoding="utf-8") == text


def test_missing_document_is_an_error(tmp_path, capsys):
    assert main(["--check", str(tmp_path / "none.md")]) == 2
    assert "none.md" in capsys.readouterr().err


def test_printing(capsys):
    assert main(["--table"]) == 0
    assert capsys.readouterr().out == methods.table()
    assert main([]) == 0
    assert capsys.readouterr().out.split() == [*methods.list()]


@pytest.mark.skipif(not README.is_file(), reason="not in a source tree")
def test_readme_table_is_fresh():
    text = README.read_text(encoding="utf-8")
    assert replace_table(text, methods.table()) == text, (
        "run: python -m transfuse.methods --table --write README.md"
    )
