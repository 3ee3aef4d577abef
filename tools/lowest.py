"""Print the lowest versions that pyproject.toml allows, as constraints for pip, for `make lowest`."""

import re
from collections.abc import Iterable, Iterator
from importlib import metadata

BOUND = re.compile(r"(?P<name>[\w.-]+)(\[.*\])?>=(?P<version>[\d.]+)(; extra == \"(?P<extra>\w+)\")?")


def lowest(requirements: Iterable[str]) -> Iterator[str]:
    """`peft>=0.19` to `peft==0.19`, without the test tools, and without torch, whose build depends on the machine."""
    for bound in filter(None, map(BOUND.fullmatch, requirements)):
        if bound["name"] != "torch" and bound["extra"] not in ("dev", "mutants"):
            yield f"{bound['name']}=={bound['version']}"


if __name__ == "__main__":
    print("\n".join(lowest(metadata.requires("customized-grpo") or ())))
