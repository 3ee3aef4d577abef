"""WebDataset shards: tar files in which the members `NAME.ENDING` of one name are the fields of one sample."""

import re
import tarfile
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from customized_grpo.data.decode import PICTURES
from customized_grpo.errors import UserError
from customized_grpo.store import parse_json

MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
"""Name and ending of a member; the ending begins at the first dot, as in the webdataset and datasets packages."""


class Sample(Mapping[str, Any]):
    """The fields of a sample by ending, each read from its place in the shard when it is asked for.

    Images are bytes, `json` is what it holds, and everything else is text. `json.prompt` is a field of the object in
    `json`. A field that the sample lacks is None.
    """

    def __init__(self, shard: Path, name: str, places: Mapping[str, tuple[int, int]]) -> None:
        self.shard, self.name, self.places = shard, name, places

    def __getitem__(self, field: str) -> Any:
        if field == "__key__":
            return self.name
        if field not in self.places:
            whole, _, part = field.partition(".")
            return self[whole].get(part) if whole == "json" and whole in self.places else None
        where = f"'{self.shard}', member '{self.name}.{field}'"
        content = self._read(*self.places[field], where)
        if f".{field.rpartition('.')[2].lower()}" in PICTURES:
            return content
        try:
            text = content.decode()
        except UnicodeDecodeError:
            raise UserError(f"{where} is neither an image nor text in UTF-8; leave it out of the columns.") from None
        return parse_json(text, where) if field == "json" else text

    def _read(self, start: int, size: int, where: str) -> bytes:
        try:
            with self.shard.open("rb") as file:
                file.seek(start)
                content = file.read(size)
        except OSError as error:
            raise UserError(f"{where} cannot be read ({error.strerror}); check the shard.") from error
        if len(content) != size:
            raise UserError(f"{where} ends early: {len(content)} of {size} bytes; copy the shard again.")
        return content

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class Shards:
    """The samples of shards by number, in the order of the files.

    A training takes examples by number, shuffles each epoch and resumes at an iteration. So the headers of the tar
    files are read once, and the contents where they lie: nothing is unpacked, and there is no position to store.
    `datasets` streams shards in their order alone, which gives neither.

    Raises:
        UserError: if a file is not an uncompressed tar file, or there is no sample.
    """

    def __init__(self, files: list[Path]) -> None:
        self.samples = [sample for file in files for sample in _samples(file)]
        if not self.samples:
            raise UserError(f"'{files[0]}' holds no sample; a shard has members such as 000.jpg and 000.json.")

    @property
    def column_names(self) -> list[str]:
        """The fields of all samples, and those of the objects in `json` of the first hundred."""
        names = dict.fromkeys(field for sample in self.samples for field in sample)
        objects = [sample["json"] for sample in self.samples[:100] if "json" in names and "json" in sample.places]
        return ["__key__", *names, *dict.fromkeys(f"json.{key}" for some in objects for key in some)]

    def unique(self, column: str) -> list[Any]:
        return list(dict.fromkeys(self[column]))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | str) -> Any:
        """A sample, or a column of all samples."""
        return self.samples[key] if isinstance(key, int) else [sample[key] for sample in self.samples]


def _samples(file: Path) -> Iterator[Sample]:
    try:
        with file.open("rb") as content, tarfile.open(fileobj=content, mode="r:") as archive:
            members = [
                (found[1], found[2], member.offset_data, member.size)
                for member in archive
                if member.isfile() and (found := MEMBER.fullmatch(member.name))
            ]
            content.seek(archive.offset)
            if content.read(512) != bytes(512):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset}")
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"'{file}' cannot be read as a shard ({error}); it must be a complete tar file without compression."
        ) from error
    for name, fields in groupby(members, key=lambda member: member[0]):
        yield Sample(file, name, {field: (start, size) for _, field, start, size in fields})
