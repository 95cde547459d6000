"""What a data set looks like on disk and on the Hub, and how it is opened."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..tasks import Task
from .columns import Column, ColumnDataset, check_tasks
from .rows import open_table

Row = dict[str, str | Path | tuple[Path, ...]]


@dataclass(frozen=True)
class Format:
    """A published data set whose files are read as they are published. Nothing is downloaded but by ``datasets``.

    Attributes:
        name: of the data set, as `--data_format` gives it.
        tasks: all that it has labels of.
        columns: task → column of its labels.
        published: where the files are, in words and links.
        images: split → images that the published one has; splits that are not named have any number.
        list_rows: (root, split) → rows of paths, of a folder of files.
        marker: what a folder of files has, below the root, `{split}` in place of the split's name.
        hub: name of the same on the Hub, whose columns are `columns` too; None: there is none.
    """

    name: str
    tasks: tuple[Task, ...]
    columns: Mapping[str, Column]
    published: str
    images: Mapping[str, int]
    list_rows: Callable[[Path, str], list[Row]] = field(repr=False)
    marker: str
    hub: str | None = None

    def __post_init__(self):
        check_tasks(self.tasks, self.columns, self.name)

    def is_of_files(self, root: str | Path, split: str) -> bool:
        """Whether ``root`` is a folder of files; else it is one of parquet, or a name on the Hub."""
        return self.hub is None or (Path(root) / self.marker.format(split=split)).is_dir()

    def open(self, root: str | Path, split: str, tasks: Sequence[Task]) -> ColumnDataset:
        """The samples of a split.

        Args:
            root: folder of the data set; where there is one on the Hub, its name there, or a folder of its parquet
                files.
            split: such as train or val.
            tasks: whose labels to read.

        Raises:
            ValueError: the folder is not one of this data set, or lacks a file; it says what, and where it is
                published. Or a task has no labels here.
        """
        check_tasks(tasks, self.columns, self.name)
        if not self.is_of_files(root, split):
            try:
                return open_table(str(root), split, tasks, self.columns)
            except ValueError as error:
                raise ValueError(f"{error}; {self.name} is published by {self.published}") from error
        marker = Path(root) / self.marker.format(split=split)
        if not marker.is_dir():
            raise ValueError(f"{marker} is missing: {root} is no folder of {self.name}, published by {self.published}")
        try:
            rows = self.list_rows(Path(root), split)
        except OSError as error:
            raise ValueError(f"{error}; {self.name} is published by {self.published}") from error
        if not rows:
            raise ValueError(f"{marker} holds no images; {self.name} is published by {self.published}")
        return ColumnDataset(rows, tasks, self.columns, source=str(root))

    def files(self, root: str | Path, split: str) -> Iterator[Path]:
        """All files of a split, in order; those of parquet where there are no others."""
        if not self.is_of_files(root, split):
            yield from sorted(Path(root).rglob(f"{split}*.parquet"))
            return
        for row in self.list_rows(Path(root), split):
            for value in row.values():
                files = value if isinstance(value, tuple) else (value,)
                yield from (file for file in files if isinstance(file, Path))


def list_numbered(root: Path, split: str, folders: Mapping[str, str]) -> list[Row]:
    """Rows of ``root/split/<folder>/<number>.npy``, in the order of the numbers; column → folder.

    A label that is missing is left out. Raises OSError for a folder that is missing.
    """
    found = {}
    for column, folder in folders.items():
        files = (root / split / folder).iterdir()
        found[column] = {file.stem: file for file in files if file.suffix == ".npy"}
    stems = sorted(found["image"], key=lambda stem: (len(stem), stem))
    return [{"name": s, **{column: files[s] for column, files in found.items() if s in files}} for s in stems]


def read_list(file: Path) -> list[str]:
    """The names in a file, a line each. Raises OSError if there is no such file."""
    return [line.strip() for line in file.read_text().splitlines() if line.strip()]
