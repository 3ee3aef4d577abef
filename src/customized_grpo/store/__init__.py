"""Folders and files that survive kills, power cuts and a second process. Nothing here imports torch or a model."""

from customized_grpo.store.files import (
    append,
    check_place,
    checksum,
    is_file,
    parse_json,
    plain,
    read_json,
    read_lines,
    read_text,
    replacing,
    write,
)
from customized_grpo.store.folder import Folder, now

__all__ = [
    "Folder", "append", "check_place", "checksum", "is_file", "now", "parse_json", "plain", "read_json", "read_lines",
    "read_text", "replacing", "write",
]  # fmt: skip
