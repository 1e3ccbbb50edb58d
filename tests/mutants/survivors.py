"""Which mutants may survive? Those that `survivors.yaml` explains, by what they change."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import yaml

_LIST = Path(__file__).with_name("survivors.yaml")


@dataclass(frozen=True)
class Change:
    """A mutant by what it changes: its number changes with the code before it."""

    file: str
    function: str
    was: str
    is_: str

    def __str__(self) -> str:
        return f"{self.file}, {self.function}\n    - {self.was}\n    + {self.is_}"

    @classmethod
    def of_mutant(cls, name: str, diff: str) -> Self:
        """Return what a mutant changes, by its name and its diff."""
        file = re.search(r"^--- (\S+)", diff, re.MULTILINE)
        assert file is not None, diff
        lines = diff[file.start() :].splitlines()[2:]
        was, is_ = (
            " ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+"
        )
        mangled = name.rpartition(".")[2].rpartition("__mutmut_")[0]
        function = mangled.removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
        return cls(file[1], function, was, is_)


class Explained:
    """What `survivors.yaml` says."""

    def __init__(self) -> None:
        listed = yaml.safe_load(_LIST.read_text(encoding="utf-8"))
        self._parts = [re.compile(each["part"]) for each in listed["everywhere"] if each["why"]]
        self.changes = Counter(
            Change(file["file"], each["function"], each["was"], each["is"])
            for file in listed["by_file"]
            for each in file["survivors"]
            if each["why"]
            for _ in range(each.get("times", 1))
        )

    def is_everywhere(self, change: Change) -> bool:
        """Whether a change is of a kind that is explained once for all files."""
        return any(part.sub("", change.was) == part.sub("", change.is_) for part in self._parts)
