"""Reading scored pairs, documents and images, and saying what is wrong with them by file and row.

One file of this folder holds one idea: `names` finds the files that a name means, `streams` opens them, `tables`, `parquet`
and `webdataset` find rows in them, `values` says what a value is whatever the file, `pairs` and `documents` put it together,
`images` decodes pictures and `faults` words what is wrong.
"""

from gcl_kernels.training.data.documents import read_documents
from gcl_kernels.training.data.faults import LINES_SHOWN, shown
from gcl_kernels.training.data.headers import DOCUMENT_IDS, columns_in, first_of
from gcl_kernels.training.data.images import MOST_PIXELS, ImageCheck, ImageError, decode_image, image_fault, load_image
from gcl_kernels.training.data.names import files_of
from gcl_kernels.training.data.pairs import KEY_END, Columns, PairFile, Pairs, read_pairs

__all__ = [
    "DOCUMENT_IDS",
    "KEY_END",
    "LINES_SHOWN",
    "MOST_PIXELS",
    "Columns",
    "ImageCheck",
    "ImageError",
    "PairFile",
    "Pairs",
    "columns_in",
    "decode_image",
    "files_of",
    "first_of",
    "image_fault",
    "load_image",
    "read_documents",
    "read_pairs",
    "shown",
]
