"""`resume`: start a command so that its run goes on, and again when it fails."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import click

from ckpt.console import Json, StartsCommand, age, count, json_option, output, plain, size, url_argument
from ckpt.errors import Corrupt, NotFound
from ckpt.resume import RESUME_FROM, Choice, Supervisor, asked_back, choose, environment
from ckpt.run import RunDirectory
from ckpt.store import Store
from ckpt.stores import open_store

RESTARTS = 100


@click.command(cls=StartsCommand, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--step", type=click.IntRange(min=0), metavar="N", help="Go on from step N; newer ones are left behind.")
@click.option("--before", type=click.IntRange(min=1), metavar="N", help="Go on from the newest step below N.")
@click.option("--allow-older", is_flag=True, help="Where the step is damaged: from the newest older one that is whole.")
@click.option("--restarts", type=click.IntRange(min=0), default=RESTARTS, show_default=True, metavar="N",
              help="Start the command again at most so often.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@json_option
@url_argument
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
def resume(
    url: str,
    step: int | None,
    before: int | None,
    allow_older: bool,
    restarts: int,
    dry_run: bool,
    as_json: bool,
    command: Sequence[str],
) -> None:
    """Start COMMAND so that its run goes on, and start it again when it fails.

    COMMAND (torchrun, python, ...) finds the run's address in CKPT_URL: ckpt.Checkpointer() without an address takes
    it from there. Before each start the step to go on from is looked at: are all its files there and whole, and do
    their digests match? The bytes of the tensors are verified when they are restored. A run without a checkpoint
    starts from nothing, and says so.

    A command that fails is started again after a growing wait, but not where that cannot help: after it failed three
    times without committing a step, when a newer job has taken the run, when the state does not fit. Signals go on to
    the command. Exits as the command did: 0, 143 when it was asked to stop, 11, 12, 13 as below.

    \b
    Examples:
      ckpt resume /data/run -- torchrun --nproc-per-node 8 train.py
      ckpt resume s3://bucket/run -- python train.py --lr 3e-4
      ckpt resume --before 12000 /data/run -- python train.py
      ckpt resume --dry-run /data/run -- python train.py

    \b
    --json, with --dry-run, prints
      {"url": str, "step": int | null, "attempt": str | null, "why": str,
       "back": bool, "world": int | null, "nbytes": int, "unix_s": float,
       "newest_attempt": int | null, "behind": int, "environment": {str: str}}
    """
    if step is not None and before is not None:
        raise click.UsageError("--step and --before exclude each other")
    if as_json and not dry_run:
        raise click.UsageError("--json is for --dry-run: otherwise standard output is the command's")
    store = open_store(url)
    plan = _Plan(store, partial(choose, step=step, before=before, allow_older=allow_older))
    if dry_run:
        plan.look(None)
        output(plan.json(), as_json, lambda found: click.echo(plan.words()))
        return
    if command[0] == "--":
        command = command[1:]
    supervisor = Supervisor(list(command), plan.make, plan.progress, _tell, restarts, allow_older)
    try:
        code = supervisor.run()
    except OSError as error:
        raise click.UsageError(f"{command[0]}: {error.strerror}") from error
    if code == 0 and not plan.progress():
        place = plain(store.url)
        _tell(f"but nothing was saved in {place}: is that where it saves? ckpt.Checkpointer() goes by CKPT_URL")
    sys.exit(code)


class _Plan:
    """What the next start goes on from."""

    def __init__(self, store: Store, choose_from: Callable[..., Choice]) -> None:
        self._store, self._choose = store, choose_from
        self._back = ""  # what was asked for at first, until it is done
        self.choice = Choice(None, False, "", None)
        self.environment: dict[str, str] = {}

    def make(self, failed: int | None) -> dict[str, str]:
        """Look again, say what was found, and return the environment."""
        self.look(failed)
        _tell(self.words())
        return self.environment

    def look(self, failed: int | None) -> None:
        """Find what to go on from. Thorough where the bytes may be why the last start failed."""
        from ckpt.check import is_whole

        run = self._open()
        if run is None:
            self.choice = Choice(None, False, "there is no run yet: it starts from nothing", None)
            self.environment = {"CKPT_URL": self._store.url}
        else:
            view = run.log.read()
            if self._back and asked_back(view, self._back) is None:
                self._choose, self._back = partial(self._choose, step=None, before=None), ""
            thorough = failed is not None and failed < 128  # it was not killed, so the bytes may be why it failed
            try:
                self.choice = self._choose(view, run.attempts(), partial(is_whole, run, thorough=thorough))
            except (Corrupt, NotFound) as error:
                raise type(error)(f"{run.url}: {error}") from None
            self.environment = environment(run.url, self.choice, view.generation)
            self._back = self.environment.get(RESUME_FROM, "")

    def _open(self) -> RunDirectory | None:
        try:
            return RunDirectory.at(self._store)
        except NotFound:
            return None

    def progress(self) -> int:
        run = self._open()
        return len(run.log.read().commits) if run else 0

    def words(self) -> str:
        commit, choice = self.choice.commit, self.choice
        if commit is None:
            return f"{self._store.url}: {choice.why}"
        behind = f", {count(choice.behind, 'step')} behind the newest attempt" if choice.behind else ""
        return plain(
            f"{self._store.url}: going on from step {commit.step} ({choice.why}), {age(commit.unix_s)} old, "
            f"{size(commit.nbytes)}, saved by {count(commit.world, 'rank')}{behind}"
        )

    def json(self) -> Json:
        commit = self.choice.commit
        return {
            "url": self._store.url,
            "step": commit.step if commit else None,
            "attempt": commit.attempt if commit else None,
            "why": self.choice.why,
            "back": self.choice.back,
            "world": commit.world if commit else None,
            "nbytes": commit.nbytes if commit else 0,
            "unix_s": commit.unix_s if commit else 0.0,
            "newest_attempt": self.choice.newest_attempt,
            "behind": self.choice.behind,
            "environment": self.environment,
        }


def _tell(what: str) -> None:
    click.echo(f"ckpt resume: {what}", err=True)
