"""Banks in the files of other programs: `read_bank` takes bytes of any supported format, `write_bank` gives them.

Files are hostile until read: sizes are bounded, no markup is interpreted, no entity expanded, and every row ends as a
question or as a rejection with line and reason.
"""

from ming_app.exam.formats.reading import FORMATS, BankFileError, ColumnsError, Import, ReadOptions, Rejected, read_bank
from ming_app.exam.formats.writing import WRITERS, write_bank

__all__ = [
    "FORMATS",
    "WRITERS",
    "BankFileError",
    "ColumnsError",
    "Import",
    "ReadOptions",
    "Rejected",
    "read_bank",
    "write_bank",
]
