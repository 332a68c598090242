"""What a run's directory may look like after a power cut: recorded operations, and a model of what POSIX lets survive.

`record` notes what this process does to files below a folder; `Disk` replays such notes, and tells what is certain to
last: the data of a file once that was fsynced, a name once its directory was. Everything younger may be there or not,
each name for itself and each page of data for itself: as it was, as it shall be, or zero.
"""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import xxhash

VARIABLE = "HOLDFAST_TEST_RECORD"
PAGE = 4096
SUBSETS = 32  # of the names that are not certain, at each instant

Note = tuple[Any, ...]
Tree = dict[str, "bytes | Tree"]


# Recording


def record(root: str, notes: str) -> Callable[[Note], None]:
    """From now on append what this process does below `root` to the file `notes`; also a function that adds a note.

    What it does by the functions of `os`, that is: what `open()` or a library in C writes is not seen.
    """
    out = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    write, folders = os.write, dict[int, str]()

    def note(*what: Any) -> None:
        write(out, pickle.dumps(what))

    def below(path: Any, directory: int | None = None) -> str | None:
        text = os.path.join(folders.get(directory, "") if directory is not None else "", os.fspath(path))
        return os.path.relpath(text, root) if f"{text}/".startswith(f"{root}/") else None

    def wrap(name: str, tell: Callable[..., None]) -> None:
        original = getattr(os, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            existed = name == "open" and os.path.lexists(arguments[0]) if isinstance(arguments[0], str) else False
            result = original(*arguments, **options)
            tell(result, existed, *arguments, **options)
            return result

        setattr(os, name, wrapper)

    def opened(fd: int, existed: bool, path: Any, flags: int, *_: Any, dir_fd: int | None = None, **__: Any) -> None:
        if isinstance(path, int) or (found := below(path, dir_fd)) is None:
            folders.pop(fd, None)
            return
        folders[fd] = os.path.join(root, found)
        if flags & os.O_CREAT and not existed:
            note("create", found)

    def on_fd(kind: str) -> Callable[..., None]:
        def tell(result: Any, existed: bool, fd: int, *rest: Any) -> None:
            if fd not in folders or fd == out:
                return
            if kind == "pwrite":
                note("write", below(folders[fd]), rest[1], bytes(rest[0][:result]))
            elif kind == "write":
                note("append", below(folders[fd]), bytes(rest[0][:result]))
            elif kind == "posix_fallocate":
                note("grow", below(folders[fd]), rest[0] + rest[1])
            elif kind == "ftruncate":
                note("cut", below(folders[fd]), rest[0])
            else:
                note(kind, below(folders[fd]))

        return tell

    def named(kind: str, paths: int) -> Callable[..., None]:
        def tell(result: Any, existed: bool, *arguments: Any, dir_fd: int | None = None, **_: Any) -> None:
            found = [below(path, dir_fd) for path in arguments[:paths]]
            if None not in found:
                note(kind, *found)

        return tell

    def closed(result: None, existed: bool, fd: int) -> None:
        folders.pop(fd, None)

    wrap("open", opened)
    wrap("close", closed)
    for name in ("pwrite", "write", "posix_fallocate", "ftruncate", "fsync"):
        wrap(name, on_fd(name))
    for name, paths in (("link", 2), ("rename", 2), ("replace", 2), ("unlink", 1), ("mkdir", 1), ("rmdir", 1)):
        wrap(name, named(name, paths))
    return lambda what: note(*what)


def record_keeper() -> None:
    """In a keeper that starts: record as its worker does."""
    record(*os.environ[VARIABLE].split("|"))


def notes_of(path: Path) -> list[Note]:
    with path.open("rb") as file:
        found = []
        while file.peek(1):
            found.append(pickle.load(file))
        return found


# The model


@dataclass(eq=False)
class File:
    data: bytearray = field(default_factory=bytearray)
    certain: bytes = b""  # as of the last fsync


@dataclass(eq=False)
class Directory:
    names: dict[str, File | Directory] = field(default_factory=dict)
    certain: dict[str, File | Directory] = field(default_factory=dict)
    pending: list[tuple[str | None, str | None, File | Directory | None]] = field(default_factory=list)
    """Since the last fsync, in order: (name that goes, name that comes, what it names)."""


class Disk:
    """The tree below a folder that existed before, while notes are replayed."""

    def __init__(self) -> None:
        self.root = Directory()

    def find(self, path: str) -> Any:
        node: Any = self.root
        for name in [part for part in path.split("/") if part != "."]:
            node = node.names[name]
        return node

    def _parent(self, path: str) -> tuple[Directory, str]:
        head, name = os.path.split(path)
        return self.find(head or "."), name

    def _change(self, path: str, gone: str | None, come: str | None, node: File | Directory | None) -> None:
        parent, _ = self._parent(path)
        if gone is not None:
            parent.names.pop(gone)
        if come is not None and node is not None:
            parent.names[come] = node
        parent.pending.append((gone, come, node))

    def replay(self, note: Note) -> None:
        kind, path, *rest = note
        name = os.path.basename(path) if isinstance(path, str) else ""
        if kind in ("create", "mkdir"):
            self._change(path, None, name, File() if kind == "create" else Directory())
        elif kind in ("unlink", "rmdir"):
            self._change(path, name, None, None)
        elif kind == "link":
            self._change(rest[0], None, os.path.basename(rest[0]), self.find(path))
        elif kind in ("rename", "replace"):
            if os.path.dirname(path) != os.path.dirname(rest[0]):
                raise NotImplementedError(f"{path} is renamed to {rest[0]}, into another folder: no model of that")
            self._change(path, name, os.path.basename(rest[0]), self.find(path))
        elif kind == "write":
            at, data = rest
            file = self.find(path)
            file.data.extend(bytes(max(0, at + len(data) - len(file.data))))
            file.data[at : at + len(data)] = data
        elif kind == "append":
            self.find(path).data.extend(rest[0])
        elif kind == "grow":
            file = self.find(path)
            file.data.extend(bytes(max(0, rest[0] - len(file.data))))
        elif kind == "cut":
            file = self.find(path)
            del file.data[rest[0] :]
            file.data.extend(bytes(rest[0] - len(file.data)))
        elif kind == "fsync":
            node = self.find(path)
            if isinstance(node, File):
                node.certain = bytes(node.data)
            else:
                node.certain, node.pending = dict(node.names), []

    def tree(self) -> Tree:
        """What a process sees now."""
        return _tree(self.root, lambda directory: directory.names, lambda file: bytes(file.data))

    def images(self, draw: random.Random, torn: int) -> Iterator[Tree]:
        """Trees that a power cut may leave now: subsets of the uncertain names, times fates of the uncertain data."""
        uncertain = list(_uncertain(self.root))
        places = [(directory, i) for directory in uncertain for i in range(len(directory.pending))]
        for chosen in _subsets(places, draw):
            kept = {id(directory): [i in chosen.get(id(directory), ()) for i in range(len(directory.pending))]
                    for directory in uncertain}  # fmt: skip
            for fate in ("old", "new", "zero", *("torn",) * torn):
                yield _tree(self.root, _names_of(kept), _contents_of(fate, draw))


def _names_of(kept: dict[int, list[bool]]) -> Callable[[Directory], dict[str, File | Directory]]:
    return lambda directory: _names(directory, kept.get(id(directory), []))


def _contents_of(fate: str, draw: random.Random) -> Callable[[File], bytes]:
    return lambda file: _content(file, fate, draw)


def _uncertain(directory: Directory) -> Iterator[Directory]:
    if directory.pending:
        yield directory
    nodes = {id(node): node for node in (*directory.names.values(), *directory.certain.values())}
    for node in nodes.values():
        if isinstance(node, Directory):
            yield from _uncertain(node)


def _subsets(places: Sequence[tuple[Directory, int]], draw: random.Random) -> Iterator[dict[int, set[int]]]:
    """All of them where they are few, else none, all, each prefix, and some drawn at random."""
    masks: Any
    if 2 ** len(places) <= SUBSETS:
        masks = product((False, True), repeat=len(places))
    else:
        prefixes = [[i < n for i in range(len(places))] for n in range(len(places) + 1)]
        masks = prefixes + [[draw.random() < 0.5 for _ in places] for _ in range(SUBSETS)]
    for mask in masks:
        chosen: dict[int, set[int]] = {}
        for (directory, index), kept in zip(places, mask, strict=True):
            if kept:
                chosen.setdefault(id(directory), set()).add(index)
        yield chosen


def _names(directory: Directory, kept: Sequence[bool]) -> dict[str, File | Directory]:
    names = dict(directory.certain)
    for (gone, come, node), lasts in zip(directory.pending, kept, strict=True):
        if lasts:
            if gone is not None:
                names.pop(gone, None)
            if come is not None and node is not None:
                names[come] = node
    return names


def _content(file: File, fate: str, draw: random.Random) -> bytes:
    new, old = bytes(file.data), file.certain
    if new == old or fate == "new":
        return new
    if fate == "old":
        return old
    if fate == "zero":
        return old + bytes(max(0, len(new) - len(old)))
    pages = []
    for at in range(0, len(new), PAGE):
        page = new[at : at + PAGE]
        pages.append(draw.choice((page, old[at : at + PAGE].ljust(len(page), b"\0"), bytes(len(page)))))
    return b"".join(pages)[: draw.choice((len(new), draw.randint(0, len(new))))]


def _tree(
    directory: Directory,
    names: Callable[[Directory], dict[str, File | Directory]],
    content: Callable[[File], bytes],
) -> Tree:
    return {
        name: content(node) if isinstance(node, File) else _tree(node, names, content)
        for name, node in names(directory).items()
    }


# Images


def digest_of(tree: Tree) -> bytes:
    state = xxhash.xxh3_128()
    for name, node in sorted(tree.items()):
        state.update(name.encode() + b"\0")
        state.update(b"f" + node if isinstance(node, bytes) else b"d" + digest_of(node))
    return state.digest()


def lay_out(tree: Tree, folder: Path) -> None:
    """Make `folder` hold `tree`."""
    folder.mkdir(exist_ok=True)
    for name, node in tree.items():
        if isinstance(node, bytes):
            (folder / name).write_bytes(node)
        else:
            lay_out(node, folder / name)


def read_tree(folder: Path) -> Tree:
    return {each.name: each.read_bytes() if each.is_file() else read_tree(each) for each in folder.iterdir()}
