"""All exercises under one interface: the tasks in NumPy, then those in CUDA."""

import dataclasses
import difflib
import re
from pathlib import Path

from minilm import checks
from minilm.exercises import cuda, process, task as parts, tasks
from minilm.exercises.grading import Verdict

NAMES = (*tasks.ORDER, *cuda.TITLES)


@dataclasses.dataclass(frozen=True)
class Exercise:
    """An exercise by its name: `softmax`, or `cuda_softmax`. find() makes one."""

    name: str

    @property
    def number(self) -> int:
        return 1 + NAMES.index(self.name)

    @property
    def in_cuda(self) -> bool:
        return self.name in cuda.TITLES

    @property
    def title(self) -> str:
        return cuda.TITLES[self.name] if self.in_cuda else tasks.load(self.name).title

    @property
    def file(self) -> str:
        return f"{self.number:02}_{self.name}.{'cu' if self.in_cuda else 'py'}"

    @property
    def hints(self) -> tuple[str, str]:
        return cuda.HINTS[self.name] if self.in_cuda else tasks.load(self.name).hints

    def text(self, folder: str = "DIR") -> str:
        """What `start` writes into the file."""
        return cuda.text(self.name, folder) if self.in_cuda else parts.student_file(tasks.load(self.name), folder)

    def solution(self) -> str:
        return cuda.solution(self.name) if self.in_cuda else parts.solution_text(tasks.load(self.name))

    def path(self, folder: Path) -> Path:
        """The file in the folder, also under another number; or `folder` itself, if it is a file. Raises
        FileNotFoundError."""
        if not folder.is_dir():
            return folder
        suffix = Path(self.file).suffix
        found = sorted((*folder.glob(f"[0-9][0-9]_{self.name}{suffix}"), *folder.glob(f"{self.name}{suffix}")))
        if not found:
            raise FileNotFoundError(f"{folder} has no {self.file}: start {self.name} {folder} writes it")
        if len(found) > 1:
            raise FileNotFoundError(f"{folder} has {found[0].name} and {found[1].name}; keep one of them")
        return found[0]

    def check(self, folder: Path, seconds: float) -> Verdict:
        """The verdict on the file in the folder, or on the file. Raises FileNotFoundError without one."""
        path = self.path(folder)
        checks.ordinary_file(path)
        return cuda.check(self.name, path) if self.in_cuda else process.check(tasks.load(self.name), path, seconds)


def find(words: str) -> Exercise:
    """The exercise with this number, name (in letters of either case), or name of a file. Raises LookupError."""
    if words.isdecimal() and 0 < int(words[:9]) <= len(NAMES):
        return Exercise(NAMES[int(words) - 1])
    name = re.sub(r"^\d\d_|\.(py|cu)$", "", Path(words).name.lower())
    if name not in NAMES:
        near = [other for other in NAMES if name and name in other] or difflib.get_close_matches(name, NAMES)
        meant = f" Did you mean {' or '.join(near[:3])}?" if near else ""
        raise LookupError(f"no task {words!r}; `list` shows the {len(NAMES)} tasks by number and name.{meant}")
    return Exercise(name)
