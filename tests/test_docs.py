"""Every code block of README.md and docs/ is run: page by page, in the order of the page, in one fresh folder a page.

What a page needs and does not show stands in it as a block in an HTML comment. By the first word behind the fence:

python         run in this process; blocks of a page share their names. `python train.py`: written to that file instead
sh             commands, one a line; `# ..., exits 3` behind one is the exit code to expect, else 0
console        the same behind `$ `, with all that is printed; `...` stands for any text, blanks count as one
diff           its new lines are run as python
text           shows something and is not run; `<!-- not run: REASON -->` before a block leaves out another kind

`ckpt` runs in this process, which saves importing torch each time; everything else as a real process under bash.
"""

from __future__ import annotations

import contextlib
import doctest
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import servers
from jobs import ROOT

import ckpt.cli
import elastic.cli

PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```" in page.read_text()]
NOT_RUN = 4
ELSEWHERE = {
    "chaos.md": "tests/test_chaos.py runs the scenarios, and tests/test_chaos_judge.py reads them",
    "frameworks.md": "tests/test_frameworks.py runs the programs that its diffs are taken from",
}
SMALLER = {
    "steps(5000": "steps(100 + 100 * int(os.environ.get('WORLD_SIZE', '1'))",
    "--nproc-per-node 4": "--nproc-per-node 2",
    "--nproc-per-node 3": "--nproc-per-node 1",
    "with_dcp.py run5": "with_dcp.py run5 20",
    "--nodes 2:8": "--nodes 1:8",
    "--nnodes 2:8": "--nnodes 1:8",
}
DEADLINE_S = 120

_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^>]+) -->\n+)?"
    r"(?P<indent> *)```(?P<kind>[^\s`]*) ?(?P<file>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_IN_PROCESS = {"ckpt": ckpt.cli.main, "elastic": elastic.cli.main}
_CODE = re.compile(r"\bexits (\d+)$")
_SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """One fenced block; `reason`: why it is not run."""

    where: str
    kind: str
    file: str
    text: str
    reason: str

    @property
    def runs(self) -> bool:
        return self.kind != "text" and not self.reason


@dataclass(frozen=True)
class Command:
    """One command, its exit code, and what it prints (None: anything)."""

    where: str
    line: str
    code: int
    printed: str | None


def blocks(page: Path) -> Iterator[Block]:
    whole = page.read_text()
    assert len(re.findall(r"^ *```", whole, re.MULTILINE)) == 2 * len(list(_FENCE.finditer(whole))), page
    for found in _FENCE.finditer(whole):
        where = f"{page.name}:{whole[: found.start('indent')].count(chr(10)) + 1}"
        text = textwrap.dedent(found["text"])
        yield Block(where, found["kind"], found["file"], text, found["reason"] or ELSEWHERE.get(page.name, ""))


def commands(block: Block) -> Iterator[Command]:
    if block.kind == "sh":
        for line in block.text.replace("\\\n", "").splitlines():
            if line.strip():
                yield _command(block.where, line, None)
        return
    _, *pieces = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert pieces, f"{block.where} has no line that begins with `$ `"
    for piece in pieces:
        line, _, printed = piece.partition("\n")
        yield _command(block.where, line, printed)


def _command(where: str, line: str, printed: str | None) -> Command:
    line, _, comment = line.partition(" #")
    code = _CODE.search(comment)
    return Command(where, line.strip(), int(code[1]) if code else 0, printed)


def slow_pages(page: Path) -> object:
    return pytest.param(page, marks=pytest.mark.prove) if page.name == "failures.md" else page


class Reader:
    """A person who types a page's blocks into a shell in `folder`."""

    def __init__(self, folder: Path, heard: Callable[[], str]) -> None:
        self._folder, self._heard = folder, heard
        self._names: dict[str, object] = {}

    def follow(self, block: Block) -> None:
        text = self._here(block.text)
        if block.kind == "python" and block.file:
            (self._folder / block.file).write_text(text)
        elif block.kind in ("python", "diff"):
            if block.kind == "diff":
                text = "\n".join(line[1:] for line in text.splitlines() if line.startswith("+"))
            exec(compile(text, block.where, "exec"), self._names)
        else:
            assert block.kind in ("sh", "console"), f"{block.where}: say what {block.kind or 'this block'} is"
            for command in commands(block):
                self._do(command)

    def _here(self, text: str) -> str:
        for large, small in SMALLER.items():
            text = text.replace(large, small)
        return re.sub(r"(?<![\w./])/shared\b", str(self._folder / "shared"), text)

    def _do(self, command: Command) -> None:
        self._heard()
        line = self._here(command.line)
        words = shlex.split(line)
        if words[0] in _IN_PROCESS and words[1] != "run" and not re.search(r"[|;<>&]", line):
            code = _called(words)
        else:
            code = subprocess.run(["bash", "-c", line], timeout=DEADLINE_S, check=False).returncode
        said = self._heard()
        assert code == command.code, f"{command.where}: `{line}` ended with {code}, not {command.code}: {said}"
        if command.printed is not None:
            said = said.replace(f"{self._folder}/shared", "/shared").replace(f"{self._folder}/", "/home/me/")
            same = doctest.OutputChecker().check_output(command.printed, said, _SAME)
            assert same, f"{command.where}: `{line}` prints\n{said}\nand the page has\n{command.printed}"


def _called(words: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            _IN_PROCESS[words[0]]()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize("page", map(slow_pages, PAGES), ids=lambda page: page.name)
def test_a_page_does_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = [block for block in blocks(page) if block.runs]
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "ELASTIC_JOIN_WINDOW_S": "0",
    }
    monkeypatch.delenv("CKPT_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    reader = Reader(tmp_path, lambda: "".join(capfd.readouterr()))
    with contextlib.ExitStack() as stack:
        if any("s3://" in block.text for block in found):
            environment |= servers.s3_environment(stack.enter_context(servers.moto()))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if "AWS_ENDPOINT_URL" in environment:
            import s3fs

            s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        for block in found:
            reader.follow(block)


def test_nearly_every_block_is_run() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    left = [f"{block.where}: {block.reason}" for block in found if block.kind != "text" and block.reason]
    left = [line for line in left if line.partition(":")[0] not in ELSEWHERE]
    assert len(left) == NOT_RUN, "\n".join(left)
    assert all(block.kind in {"python", "sh", "console", "diff", "toml", "text"} for block in found)
