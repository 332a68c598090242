"""What every store must do. A new one passes by a subclass of `StoreConformance` that says how to open it."""

from __future__ import annotations

import mmap
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ckpt.errors import Corrupt, NotFound, StorageError
from ckpt.store import AlreadyExists, OutcomeUnknown, Store

ALL = 1 << 30
REFUSED = (
    "/etc",
    "a//b",
    "a/",
    "../a",
    "a/..",
    "a/../b",
    ".",
    ".hidden",
    "A",
    "a b",
    "a\n",
    "a\0",
    "a\\b",
    "é",
    "a" * 200,
)


class RecordConformance:
    """What is needed of a place for records.

    Give it a fixture `open_again`: each call opens the same, at first empty, store anew. `directories`: whether there
    are any without a file in them. `racing`: whether it promises exclusive creates.
    """

    directories = True
    racing = True

    @pytest.fixture
    def store(self, open_again: Callable[[], Store]) -> Store:
        return open_again()

    def test_create_is_exclusive_and_makes_parents(self, store: Store, open_again: Callable[[], Store]) -> None:
        store.create("log/0000000000.json", b"first")
        with pytest.raises(AlreadyExists, match=r"0000000000\.json.*Nothing was changed"):
            open_again().create("log/0000000000.json", b"second")
        assert open_again().read("log/0000000000.json", limit_bytes=ALL) == b"first"
        assert store.list("log") == ["0000000000.json"]

    @pytest.mark.parametrize("workers", [pytest.param("processes", marks=pytest.mark.prove), "threads"])
    def test_one_of_32_racing_creators_wins(self, open_again: Callable[[], Store], workers: str) -> None:
        if not self.racing:
            pytest.skip("this store does not promise exclusive creates")
        open_again().make_directory("log")

        def wins(number: int) -> bool:
            store = open_again()
            error = caught(lambda: store.create("log/0000000007.json", content(number)))
            assert error is None or isinstance(error, (AlreadyExists, OutcomeUnknown))
            return error is None

        results = race(32, wins, workers)
        assert sorted(results) == [0] * 31 + [1]
        assert open_again().read("log/0000000007.json", limit_bytes=ALL) == content(results.index(1))

    def test_put_replaces_as_a_whole(self, store: Store) -> None:
        store.put("steps/000000001.a/MANIFEST", b"one, a longer one")
        store.put("steps/000000001.a/MANIFEST", b"two")
        assert store.read("steps/000000001.a/MANIFEST", limit_bytes=ALL) == b"two"
        assert store.size("steps/000000001.a/MANIFEST") == 3

    def test_read_ranges(self, store: Store) -> None:
        store.put("a", bytes(range(100)))
        assert store.read("a", 10, 5, limit_bytes=5) == bytes(range(10, 15))
        assert store.read("a", 90, limit_bytes=10) == bytes(range(90, 100))
        assert store.read("a", 100, limit_bytes=0) == b""
        with pytest.raises(Corrupt, match="at most 99"):
            store.read("a", limit_bytes=99)
        with pytest.raises(Corrupt, match=r"cut off; 11 bytes.*got 10"):
            store.read("a", 90, 11, limit_bytes=ALL)

    def test_what_is_missing_is_not_found(self, store: Store) -> None:
        for operation in (lambda: store.read("a/b", limit_bytes=1), lambda: store.size("a"), lambda: store.list("a")):
            with pytest.raises(NotFound):
                operation()
        assert not store.exists("a/b")
        store.delete("a/b")

    def test_list_is_sorted_and_complete(self, store: Store) -> None:
        store.make_directory("steps/empty" if self.directories else "")
        if not self.directories:
            store.put("steps/empty/file", b"")
        for name in ("b", "a", "FORMAT.json"):
            store.create(name, b"")
        assert store.list("") == ["FORMAT.json", "a", "b", "steps"]
        assert store.list("steps/empty") == ([] if self.directories else ["file"])
        assert store.exists("steps/empty")
        assert not store.exists("step")

    def test_delete(self, store: Store) -> None:
        store.put("steps/x/MANIFEST", b"m")
        store.put("steps/x/deep/er", b"d")
        store.put("steps/x.kept", b"k")
        store.delete("steps/x")
        store.delete("steps/x.kept.not")
        assert store.list("steps") == ["x.kept"]
        store.delete("steps/x.kept")
        store.put("steps/x/MANIFEST", b"again")
        assert store.list("steps") == ["x"]

    def test_directories_again(self, store: Store, open_again: Callable[[], Store]) -> None:
        for each in (store, store, open_again()):
            each.make_directory("steps/000000001.a")
            each.sync_directory("steps/000000001.a")

    @pytest.mark.parametrize("path", [*REFUSED, ""])
    def test_paths_outside_the_grammar_are_refused(self, store: Store, path: str) -> None:
        reads: list[Callable[..., object]] = [store.list, store.exists, store.make_directory, store.local_path]
        for write in (store.create, store.put):
            with pytest.raises(StorageError, match="refused the path"):
                write(path, b"")
        for operation in (store.delete, *(reads if path else ())):  # "" is the root: it can be listed
            with pytest.raises(StorageError, match="refused the path"):
                operation(path)
        with pytest.raises(StorageError):
            store.read(path, limit_bytes=1)


class StoreConformance(RecordConformance):
    """Data files too."""

    def test_a_data_file_is_written_in_any_order(self, store: Store, open_again: Callable[[], Store]) -> None:
        path, nbytes, step = "steps/000000001.a/r00000.safetensors", (36 << 20) + 4096, 5_001_216
        with pages(4096) as old:
            writer = store.write_data(path, 4096)  # by somebody who was lost
            writer.write(0, old)
            writer.finish()
        with pages(nbytes) as data:
            writer = store.write_data(path, nbytes)
            errors: list[BaseException] = []

            def write(places: list[int]) -> None:
                try:
                    for at in places:
                        writer.write(at, data[at : at + step])
                except BaseException as error:
                    errors.append(error)

            places = list(range(0, nbytes, step))
            threads = [threading.Thread(target=write, args=(places[n::3],)) for n in (2, 0, 1)]
            for act in ("start", "join"):
                for thread in threads:
                    getattr(thread, act)()
            assert not errors
            writer.finish()
            assert open_again().size(path) == nbytes
            assert open_again().read(path, limit_bytes=nbytes) == data
        assert open_again().list("steps/000000001.a") == ["r00000.safetensors"]

    def test_an_abandoned_data_file_is_in_nobodys_way(self, store: Store) -> None:
        with pages(17 << 20) as data:
            writer = store.write_data("steps/000000001.a/r00000.safetensors", 40 << 20)
            writer.write(0, data)
            writer.abandon()
            writer = store.write_data("steps/000000001.a/r00000.safetensors", 4096)
            writer.write(0, data[:4096])
            writer.finish()
            assert store.read("steps/000000001.a/r00000.safetensors", limit_bytes=4096) == data[:4096]

    def test_usage(self, store: Store) -> None:
        store.put("steps/x/MANIFEST", b"m")
        store.put("steps/x/r00000.part", b"part")
        found = store.usage("steps/x")
        assert found.nbytes == 5
        assert found.unix_s > 1e9
        with pytest.raises(NotFound):
            store.usage("steps/y")

    def test_clear_leaves_what_is_not_ours(self, store: Store) -> None:
        for name in ("MANIFEST", "r00000.part", "notes"):
            store.put(f"steps/x/{name}", b"")
            store.put(f"steps/x.kept/{name}", b"")
        assert store.clear("steps/x", lambda name: name != "notes") == ["notes"]
        assert store.list("steps/x") == ["notes"]
        assert store.clear("steps/x", lambda name: True) == []
        assert store.clear("steps/x", lambda name: True) == []
        assert store.list("steps") == ["x.kept"]
        assert store.list("steps/x.kept") == ["MANIFEST", "notes", "r00000.part"]


@contextmanager
def pages(nbytes: int) -> Iterator[memoryview]:
    """Page-aligned memory, filled with something that repeats at no power of two."""
    memory = mmap.mmap(-1, nbytes)  # it goes with its last view
    memory[:] = (bytes(range(251)) * (nbytes // 251 + 1))[:nbytes]
    yield memoryview(memory)


def caught(operation: Callable[[], object]) -> StorageError | None:
    try:
        operation()
    except StorageError as error:
        return error
    return None


def content(number: int) -> bytes:
    return bytes([number]) * 5000


def race(count: int, work: Callable[[int], int], workers: str = "processes") -> list[int]:
    """Results of `work(0)`, ..., `work(count - 1)`, all let go at the same moment; -1 for one that failed."""
    context = multiprocessing.get_context("fork")
    results: Any = context.Array("i", [-1] * count)
    barrier = context.Barrier(count) if workers == "processes" else threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait(60)
        results[number] = work(number)

    make: Callable[..., Any] = context.Process if workers == "processes" else threading.Thread
    racers = [make(target=run, args=(number,)) for number in range(count)]
    for act in ("start", "join"):
        for racer in racers:
            getattr(racer, act)()
    return list(results)
