"""Reads questions from tables: CSV and TSV of any usual dialect, and the sheets with questions of an XLSX file.

XLSX is read by openpyxl, row by row, after its zip members were measured: it is refused when they unpack to more than
MAX_UNPACKED bytes, or when a part declares a document type (the door to entity expansion). Formulas are never computed;
what was last shown in their cells is read.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ming_app.errors import MingError
from ming_app.exam.formats.columns import ALIASES, Numbered, squeezed_name, to_fields, understand
from ming_app.exam.formats.reading import MAX_ROWS, BankFileError, ReadOptions, Row
from ming_app.exam.question import LETTERS, QuestionError
from ming_app.spreadsheet import plain_cell

MAX_UNPACKED = 300 << 20
MAX_COLUMNS = 100
MAX_CELL = 40_000  # characters
HEADER_ROWS = 10  # titles may stand above the header


def looks_like(text: str) -> bool:
    """Whether the beginning of a text is a table with a header that we know."""
    first = text.lstrip("\n").partition("\n")[0]
    cells = re.split(r"[,\t;]", first)
    known = [ALIASES.get(squeezed_name(cell.strip('"'))) for cell in cells]
    return len(cells) > 2 and "stem" in known and "answer" in known


def read_csv(text: str, options: ReadOptions) -> tuple[Iterator[Row], Mapping[str, str]]:
    """Rows of a text table; separator and quoting are told from its beginning. Raises BankFileError."""
    csv.field_size_limit(MAX_CELL * 4)
    head = text[:20_000]
    first = head.partition("\n")[0]
    separator = max(",\t;", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=False)

    def cells() -> Iterator[tuple[int, Sequence[Any]]]:
        line = 1
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise BankFileError(
                    f"The table breaks off at line {reader.line_num}: {error}.",
                    f"表格在第 {reader.line_num} 行出错：{error}。",
                ) from None
            yield line, row
            line = reader.line_num + 1

    return _rows(cells(), options)


def read_xlsx(data: bytes, options: ReadOptions) -> tuple[Iterator[Row], Mapping[str, str]]:
    """Rows of every sheet that has a header with questions. Raises BankFileError where none has."""
    import openpyxl

    _measure(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # styles and extensions that do not concern us
            book = openpyxl.load_workbook(io.BytesIO(data), read_only=True, data_only=True, keep_links=False)
            failure: BankFileError | None = None
            found: list[tuple[Iterator[Row], Mapping[str, str]]] = []
            for sheet in book.worksheets:
                cells = list(_sheet(sheet))
                try:
                    found.append(_rows(iter(cells), options))
                except BankFileError as error:
                    failure = failure or error
            if found:
                columns = {name: field for _, own in reversed(found) for name, field in own.items()}
                return (row for rows, _ in found for row in rows), columns
    except MingError:
        raise
    except Exception as error:  # a library over hostile bytes: whatever it raises, the file is at fault
        raise BankFileError(
            f"The spreadsheet cannot be read ({type(error).__name__}). Open it in a spreadsheet program and save it anew.",
            f"无法读取该电子表格（{type(error).__name__}），请用表格软件打开后另存再试。",
        ) from error
    raise failure or BankFileError("The spreadsheet has no sheet.", "该电子表格没有工作表。")


def _sheet(sheet: Any) -> Iterator[tuple[int, Sequence[Any]]]:
    blank = 0
    for number, row in enumerate(sheet.iter_rows(values_only=True, max_col=MAX_COLUMNS), 1):
        if any(cell is not None for cell in row):
            blank = 0
            yield number, row
        else:
            blank += 1
        if number > MAX_ROWS + HEADER_ROWS or blank > 1_000:
            return


def _measure(data: bytes) -> None:
    """Refuses a zip bomb and parts with a document type, before anything is parsed."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if len(members) > 2_000 or sum(member.file_size for member in members) > MAX_UNPACKED:
                raise BankFileError(
                    f"The spreadsheet unpacks to more than {MAX_UNPACKED >> 20} MiB; it is not read.",
                    f"该电子表格解压后超过 {MAX_UNPACKED >> 20} MiB，拒绝读取。",
                )
            budget = MAX_UNPACKED
            for member in members:
                budget = _scan(archive, member, budget)
    except (zipfile.error, zlib.error, ValueError, EOFError, RuntimeError, NotImplementedError, OSError) as error:
        raise BankFileError("The spreadsheet is damaged or encrypted.", "该电子表格已损坏或已加密。") from error


def _scan(archive: zipfile.ZipFile, member: zipfile.ZipInfo, budget: int) -> int:
    """Reads a part in pieces; the bytes still allowed after it. What it says of its own size is not believed, and its name
    says nothing: a sheet may be called anything. A drawing may have a document type, but no entities."""
    refused = (b"<!ENTITY",) if member.filename.endswith(".svg") else (b"<!DOCTYPE", b"<!ENTITY")
    tail = b""
    with archive.open(member) as part:
        while piece := part.read(1 << 20):
            budget -= len(piece)
            if budget < 0:
                raise BankFileError("The spreadsheet is a zip bomb.", "该电子表格是压缩炸弹，拒绝读取。")
            text = tail + piece.replace(b"\0", b"")  # UTF-16 too
            if any(word in text for word in refused):
                raise BankFileError(
                    "The spreadsheet declares XML entities, which no spreadsheet program writes; it is not read.",
                    "该电子表格声明了 XML 实体（正常软件不会生成），拒绝读取。",
                )
            tail = text[-16:]
    return budget


def _rows(cells: Iterator[tuple[int, Sequence[Any]]], options: ReadOptions) -> tuple[Iterator[Row], Mapping[str, str]]:
    """Finds the header among the first rows; a table of letters only (question, options, key) may have none."""
    head: list[tuple[int, Sequence[Any]]] = []
    failure: BankFileError | None = None
    for line, row in cells:
        head.append((line, row))
        names = [str(cell).strip() if cell is not None else "" for cell in row[:MAX_COLUMNS]]
        try:
            columns = understand([name for name in names if name], options)
            return Numbered(options.count_from).apply(_made(cells, names, columns)), columns
        except BankFileError as error:
            failure = failure or error
        if len(head) >= HEADER_ROWS:
            break
    if _headless(head):
        names = ["stem", *LETTERS[: len(head[0][1]) - 2], "answer"]
        columns = understand(names, ReadOptions())
        return _made(_chain(head, cells), names, columns), columns
    raise failure or BankFileError("The table is empty.", "表格为空。")


def _headless(head: list[tuple[int, Sequence[Any]]]) -> bool:
    """Question, two to ten options, a letter: the shape of MMLU."""
    widths = {len(row) for _, row in head}
    if len(widths) != 1 or not 4 <= (width := widths.pop()) <= 12:
        return False
    return all(str(row[-1]).strip() in set(LETTERS[: width - 2]) for _, row in head)


def _chain(head: list[tuple[int, Sequence[Any]]], rest: Iterator[tuple[int, Sequence[Any]]]) -> Iterator[Any]:
    yield from head
    yield from rest


def _made(
    cells: Iterator[tuple[int, Sequence[Any]]], names: Sequence[str], columns: Mapping[str, str]
) -> Iterator[Row]:
    for line, row in cells:
        if not any(cell not in (None, "") for cell in row):
            continue
        text = " ".join(str(cell)[:80] for cell in row[:6] if cell is not None)
        extra = [cell for cell in row[len(names) :] if cell not in (None, "")]
        if extra:
            yield Row(line, QuestionError("the row has more cells than the header", "该行的单元格多于表头"), text)
            continue
        values = {name: _cell(cell) for name, cell in zip(names, row, strict=False) if name}
        yield Row(line, to_fields(values, columns), text)


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return plain_cell(value)
    return value if value is None or isinstance(value, int | float) else str(value)
