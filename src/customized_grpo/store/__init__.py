"""Folders and files that survive kills, power cuts and a second process. Knows no model and no torch."""

from customized_grpo.store.files import (
    append,
    check_place,
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
    "Folder",
    "append",
    "check_place",
    "is_file",
    "now",
    "parse_json",
    "plain",
    "read_json",
    "read_lines",
    "read_text",
    "replacing",
    "write",
]
