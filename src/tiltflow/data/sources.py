"""Where records lie: lines of JSON, Parquet, Arrow, folders of them or saved by `datasets`, and the hub."""

import glob
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from os.path import expanduser
from pathlib import Path
from typing import Any, Final

from tiltflow.data.parts import Lines, Part, Parts, Table
from tiltflow.errors import DataError

SHARDS: Final = (".jsonl", ".parquet", ".arrow")
_HUB: Final = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+?)(?::(?P<config>[^@/]+))?(?:@(?P<split>[^/]+))?")
_NUMBERED: Final = re.compile(r"(?P<split>.+)-\d+-of-\d+(?:-[0-9a-f]+)?")  # a shard as `datasets` and the hub name it
_SPLITS: Final = frozenset({"train", "validation", "valid", "val", "dev", "test", "eval"})


def open_source(source: str, *, split: str | None = None, mapped: bool = False) -> Parts:
    """Open a source.

    Args:
        source: A file (.jsonl, .parquet, .arrow); a glob pattern; a folder of files of one of these kinds, or one
            written by `datasets`' save_to_disk; or a data set of the hub as `owner/name` or `owner/name:config`. A
            split may follow a folder or a set of the hub: `owner/name@split`.
        split: The same split (default: `train` of the hub's, all of a folder). Of a folder it is a folder in it, or
            the files whose names begin with it, such as `data/train-00000-of-00002.parquet`.
        mapped: Rows may be larger than the memory: Parquet is first converted to Arrow files in the cache of
            `datasets`, which takes its size there once more, and these are mapped.

    Raises:
        DataError: There is no such source, it cannot be read, it holds no record or several splits, or a package is
            missing.
    """
    source = expanduser(source)
    base, _, named = source.rpartition("@")
    path = Path(source)
    if base and not path.exists() and Path(base).exists():
        return open_source(base, split=_one_split(source, named, split), mapped=mapped)
    if path.is_dir():
        return Parts(source, _open_folder(path, split, mapped))
    files = [path] if path.is_file() else _shards(map(Path, glob.glob(source, recursive=True)))
    found = _HUB.fullmatch(source)
    if files:
        if split is not None:
            raise DataError(
                f"data {source!r}: split={split!r} chooses from a folder or a set of the hub, and this names files; "
                "leave the split out, or name the folder"
            )
        return Parts(source, _open_files(source, files, mapped))
    if found is None or path.suffix in SHARDS:
        raise DataError(
            f"data {source!r}: no such file or folder, and nothing that the pattern matches; a data set of the hub is "
            "written owner/name@split"
        )
    if found["split"] is not None:
        split = _one_split(source, found["split"], split)
    return Parts(source, [_from_hub(source, found["name"], found["config"], split or "train")])


def _one_split(source: str, named: str, split: str | None) -> str:
    if split is not None and split != named:
        raise DataError(f"data {source!r}: split={split!r} is another one than the source's @{named}; leave one out")
    return named


def _open_folder(folder: Path, split: str | None, mapped: bool) -> list[Part]:
    if (folder / "dataset_dict.json").is_file():
        if split is None or not (folder / split / "state.json").is_file():
            raise _no_split(folder, split, [folder])
        folder, split = folder / split, None
    if (folder / "state.json").is_file():
        if split is not None:
            raise DataError(f"data {folder}: it was saved without splits; leave split={split!r} out")
        # Not by its files: a cache-*.arrow beside them holds rows once more.
        return [_from_disk(folder)]
    places = [folder, folder / "data"]
    if split is not None:
        inner = next((place / split for place in places if (place / split).is_dir()), None)
        if inner is not None:
            return _open_folder(inner, None, mapped)
    found = [_shards(place.glob("*")) for place in places]
    if split is not None:
        found = [[file for file in files if _belongs(file, split)] for files in found]
    files = next(filter(None, found), [])
    splits = {_split_of(file) for file in files} - {""}
    if not files or (split is None and len(splits) > 1):
        raise _no_split(folder, split, places)
    return _open_files(str(folder), files, mapped)


def _no_split(folder: Path, split: str | None, places: Sequence[Path]) -> DataError:
    """Return that a split is missing, or that one must be chosen: of files or folders in the places."""
    inside = [path for place in places if place.is_dir() for path in place.iterdir()]
    named = {_split_of(path) for path in _shards(inside)} - {""}
    splits = sorted(named | {path.name for path in inside if path not in places and _shards(path.glob("*"))})
    wrong = "" if split is None else f"there is no split {split!r}; "
    if not splits:
        return DataError(f"data {folder}: {wrong}the folder has no file that ends in {', '.join(SHARDS)}")
    listed = ", ".join(splits)
    return DataError(f"data {folder}: {wrong}it holds the splits {listed}; give one, as {folder}@{splits[0]}")


def _belongs(file: Path, split: str) -> bool:
    numbered = _NUMBERED.fullmatch(file.stem) is not None
    return _split_of(file) == split or (not numbered and file.stem.startswith(f"{split}-"))


def _shards(files: Iterable[Path]) -> list[Path]:
    return sorted(file for file in files if file.suffix in SHARDS and file.is_file())


def _split_of(file: Path) -> str:
    """Return the split that a file's name tells, "" if it tells none."""
    numbered = _NUMBERED.fullmatch(file.stem)
    if numbered:
        return numbered["split"]
    head = file.stem.partition("-")[0]
    first, _, rest = head.partition("_")
    if first in _SPLITS:
        return first if rest.isdigit() else head
    last = re.split("[-_]", file.stem)[-1]
    return last if last in _SPLITS else ""


def _open_files(source: str, files: Sequence[Path], mapped: bool) -> list[Part]:
    kinds = {file.suffix for file in files}
    if wrong := sorted(kinds - {*SHARDS}):
        raise DataError(f"data {source}: a file ends in {wrong[0]!r}; it must be one of {', '.join(SHARDS)}")
    if len(kinds) > 1:
        raise DataError(f"data {source}: files of the kinds {', '.join(sorted(kinds))} are mixed; name one kind")
    match kinds.pop():
        case ".jsonl":
            return [Lines(file) for file in files]
        case ".arrow":
            return [_from_arrow(file) for file in files]
        case _:
            return _converted(files) if mapped else [_from_parquet(file) for file in files]


def _from_arrow(path: Path) -> Part:
    pa = _pyarrow(path)
    try:
        file = pa.memory_map(str(path))
        try:
            table = pa.ipc.open_file(file).read_all()
        except pa.ArrowInvalid:  # the other of the two forms: `datasets` writes streams
            file.seek(0)
            table = pa.ipc.open_stream(file).read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data {path} cannot be read: {error}") from error
    return Table(str(path), path.parent, table)


def _from_parquet(path: Path) -> Part:
    pa = _pyarrow(path)
    try:
        return Table(str(path), path.parent, pa.parquet.ParquetFile(path).read())
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"data {path} cannot be read: {error}") from error


def _converted(files: Sequence[Path]) -> list[Part]:
    """Return the tables of Parquet files from the cache of `datasets`."""
    datasets = _datasets()
    metadata = _pyarrow(files[0]).parquet.read_metadata
    try:
        counts = {file: metadata(file).num_rows for file in files}
        filled = [file for file in files if counts[file]]  # the reader fails on a file without rows
        if not filled:
            return []
        table = _arrow(datasets.Dataset.from_parquet([str(file) for file in filled]))
    except Exception as error:  # pyarrow and datasets fail on a damaged file each in its own way
        reason = error.__cause__ or error
        raise DataError(f"data {', '.join(map(str, files[:3]))} cannot be read: {reason}") from error
    ends = accumulate(counts[file] for file in filled)
    return [
        Table(str(file), file.parent, table.slice(end - counts[file], counts[file]))
        for file, end in zip(filled, ends, strict=True)
    ]


def _from_disk(folder: Path) -> Part:
    datasets = _datasets()
    try:
        return Table(str(folder), folder, _arrow(datasets.load_from_disk(str(folder))))
    except Exception as error:  # as above
        raise DataError(f"data {folder} cannot be read: {error}") from error


def _from_hub(source: str, name: str, config: str | None, split: str) -> Part:
    datasets = _datasets()
    try:
        found = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the network, the hub, the files and their schema may all fail
        raise DataError(
            f"data {source!r}: no such file or folder, and no data set of the hub that can be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    return Table(source, Path(), _arrow(found))


def _arrow(dataset: Any) -> Any:
    """Return the table of a set of `datasets`, images as they are stored."""
    return dataset.with_format("arrow")[:]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data of the hub, of save_to_disk, and images in Parquet need the package datasets ({error}); install it "
            "with: pip install 'tiltflow[datasets]'"
        ) from error
    return datasets


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"data {path}: needs pyarrow; pip install 'tiltflow[parquet]'") from error
    return pyarrow
