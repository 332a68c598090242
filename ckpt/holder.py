"""The right to append: one process (rank 0) takes a generation of the run, and commits are made in its name.

Collects what a `start` record says of this process, adopts what the generation before left complete, appends the
commit of an attempt whose parts all lie on the store, and retires and deletes what a rule no longer keeps. No tensors
and no other ranks here.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from ckpt.errors import CkptError, Corrupt, Fenced, Incompatible, NotFound
from ckpt.events import point
from ckpt.log import HEAD, View, check_fence, decide_commit, decide_retire, decide_start
from ckpt.manifest import (
    MANIFEST_LIMIT_BYTES,
    PART_LIMIT_BYTES,
    Manifest,
    decode_manifest,
    decode_part,
    encode_manifest,
    matches,
    part_name,
)
from ckpt.records import Commit, Start, parse_attempt
from ckpt.retention import Keep, Plan, plan_retention
from ckpt.run import RunDirectory
from ckpt.store import OutcomeUnknown

log = logging.getLogger("ckpt")

RETIRED_AT_ONCE = 500  # attempts that one record names: it stays far below its limit
_OURS = re.compile(r"MANIFEST|r\d{5,}\.(part|safetensors|packed)|\.tmp-.*")


def check_fencing(run: RunDirectory, strict: bool) -> None:
    """Raise Incompatible, or with `strict` off warn, where the store cannot keep two writers apart.

    A Holder asks it itself; whoever appends without one, as a pin does, asks first.
    """
    if run.store.capabilities.fences:
        return
    if strict:
        raise Incompatible(
            f"{run.url}: this store cannot make a file exclusively and whole, so two writers could not be kept apart "
            f"(`ckpt doctor {run.url}` shows what was tried). If you promise that one job writes at a time, pass "
            "strict_fencing=False, or --no-strict-fencing to a command."
        )
    log.warning("%s cannot keep two writers apart; one job at a time is your promise", run.url)


@dataclass(frozen=True)
class Given:
    """A start that this job's launcher appended for its workers, as CKPT_START names it: run, generation, nonce."""

    run: str
    generation: int
    nonce: str

    @classmethod
    def of(cls, text: str) -> Given | None:
        """The start that `<run nonce>/<generation>/<start nonce>` names; None for an empty text."""
        if not text:
            return None
        parts = text.split("/")
        if len(parts) != 3 or not parts[1].isdecimal():
            raise Incompatible(f"CKPT_START is <run nonce>/<generation>/<start nonce>, not {text!r:.200}; unset it")
        return cls(parts[0], int(parts[1]), parts[2])

    def check(self, view: View) -> Start:
        """The newest start, if it is this one or goes on from it with the same members. Raises Fenced."""
        holder = view.holder
        mine = next((start for start in view.starts if start.nonce == self.nonce), None)
        if (
            mine is None
            or holder is None
            or (holder is not mine and (not mine.members or holder.members != mine.members))
        ):
            raise Fenced(
                f"the launcher started this process for generation {self.generation}, but the current one is "
                f"{view.generation}. Nothing was appended; stop this process, the newer one has the run"
            )
        return holder


_used: set[Given] = set()  # by a Holder of this process: the next one appends a start of its own


class Holder:
    """A run's directory that this process appends to, from its first `start` on.

    `Incompatible` where the store cannot keep two writers apart, unless `strict_fencing` is off.

    Where the launcher appended the start already (`given`), the first holder of a process takes that one; each later
    start of this job names the same members. `seen`: what its caller has decided from; it takes the run only if nobody
    has started since.
    """

    def __init__(
        self,
        run: RunDirectory,
        *,
        run_id: str | None,
        takeover: bool,
        strict_fencing: bool = True,
        given: Given | None = None,
        seen: View | None = None,
    ) -> None:
        check_fencing(run, strict_fencing)
        self.run = run
        self._run_id, self._takeover, self._seen = run_id, takeover, seen
        self._given = given if given is not None and given.run == run.nonce else None
        self.start: Start | None = None

    @property
    def view(self) -> View:
        return self.run.log.view

    def take(self, reason: str, base: str | None = HEAD) -> Start:
        """Append a `start`: this process holds the next generation, going on from `base`.

        `Fenced` if another process took a generation since this one did, or a live holder has another run id.
        """
        nonce, current = secrets.token_hex(8), self.start
        self.run.check_unchanged()
        if self._given is not None:
            newest = self._given.check(self.run.log.read())
            if current is None and newest.nonce == self._given.nonce and self._given not in _used:
                _used.add(self._given)
                self.start = newest
                return newest
            current = current or newest
        expected = current.generation if current else self._seen.generation if self._seen else None
        self.start = self.run.log.append(
            lambda view: decide_start(
                view,
                nonce=nonce,
                run_id=self._run_id,
                reason=reason,
                base=base,
                takeover=self._takeover or current is not None,
                holder_gone=is_gone(view.holder),
                expected_generation=expected,
                host=socket.gethostname(),
                pid=os.getpid(),
                boot_id=boot_id(),
                unix_s=time.time(),
                addresses=current.addresses if current is not None and self._given else (),
                members=current.members if current is not None and self._given else (),
            )
        )
        return self.start

    def ensure_started(self, reason: str) -> Start:
        return self.start or self.take(reason)

    def adopt(self) -> Commit | None:
        """Commit the newest complete attempt that the generations before left uncommitted on top of the head.

        Its files were durable before its MANIFEST was written; sizes and the digests of all parts are checked
        again here, and the restore that follows verifies what it reads. Where records are signed nothing is adopted:
        nobody vouches for a MANIFEST that no record names.
        """
        if self.run.log.signs:
            return None
        previous = _before(self.view)
        for name in reversed(self.run.attempts()):
            if name in self.view.commits or name in self.view.retired or self._passed(name):
                continue
            try:
                manifest, data = self._complete(name)
            except CkptError as error:
                log.info("attempt %s of an earlier generation is not complete: %s", name, error)
                continue
            head = self.view.head.attempt if self.view.head else None
            if manifest.generation in previous and manifest.parent == head:
                assert self.start is not None
                try:
                    commit = _append_commit(self.run, manifest, data, self.start.generation, self.start.nonce)
                except (Incompatible, ValueError) as error:
                    log.warning("attempt %s cannot be adopted: %s", name, error)
                    continue
                log.warning("adopted step %d, which generation %d left complete", commit.step, manifest.generation)
                return commit
        return None

    def _passed(self, name: str) -> bool:
        parsed, head = parse_attempt(name), self.view.head
        return parsed is None or (head is not None and parsed[0] <= head.step)

    def _complete(self, name: str) -> tuple[Manifest, bytes]:
        store, path = self.run.store, self.run.attempt_path
        whole = store.read(path(name, "MANIFEST"), limit_bytes=MANIFEST_LIMIT_BYTES)
        manifest = decode_manifest(whole, path(name, "MANIFEST"))
        if manifest.attempt != name:
            raise Corrupt(f"{path(name, 'MANIFEST')} is that of attempt {manifest.attempt}")
        for rank, ref in enumerate(manifest.parts):
            data = store.read(where := path(name, part_name(rank)), limit_bytes=PART_LIMIT_BYTES)
            if len(data) != ref.part_bytes or not matches(data, ref.part_digest):
                raise Corrupt(f"{where} does not match its manifest")
            file = path(name, decode_part(data, where).data_name)
            if store.size(file) != ref.data_bytes:
                raise Corrupt(f"{file} has another size than its manifest says")
        return manifest, whole


def _before(view: View) -> set[int]:
    """The generations whose attempts the newest one may adopt: back to the one that committed the head.

    Those between committed nothing: under a launcher, a generation can end before its workers have restored.
    """
    last = {commit.generation: commit.attempt for commit in view.commits.values()}
    found = set()
    for start in reversed(view.starts[:-1]):
        committed = last.get(start.generation)
        if committed is not None and (view.head is None or committed != view.head.attempt):
            break  # the run went back from there
        found.add(start.generation)
        if committed is not None:
            break
    return found


def commit_parts(run: RunDirectory, manifest: Manifest, holder_nonce: str) -> Commit:
    """Make the step of `manifest`, whose parts are durable, exist on top of the head: its MANIFEST, then its record.

    In the name of the start of that generation; `Fenced` if that is no longer the newest. Where the MANIFEST certainly
    could not be written, the attempt is removed: a full disk needs the room. Once it stands, a later generation may
    adopt the attempt, so it is never touched again.
    """
    view = run.log.read()
    if (known := view.commits.get(manifest.attempt)) is not None:
        return known
    check_fence(view, manifest.generation, holder_nonce)  # the MANIFEST of a stale writer could be adopted later
    manifest = msgspec.structs.replace(manifest, parent=view.head.attempt if view.head else None)
    data = encode_manifest(manifest)
    point("manifest", step=manifest.step)
    try:
        run.store.put(run.attempt_path(manifest.attempt, "MANIFEST"), data)
    except OutcomeUnknown:
        raise
    except CkptError:
        discard(run, manifest.attempt)
        raise
    return _append_commit(run, manifest, data, manifest.generation, holder_nonce)


def discard(run: RunDirectory, attempt: str) -> None:
    """Remove an attempt that has no MANIFEST, as far as the store lets us; `ckpt gc` removes what is left."""
    try:
        if not run.store.exists(run.attempt_path(attempt, "MANIFEST")):
            run.store.delete(run.attempt_path(attempt))
    except CkptError:
        return


def _append_commit(run: RunDirectory, manifest: Manifest, data: bytes, generation: int, holder_nonce: str) -> Commit:
    """Append the commit of `manifest`, which stands in the store as `data`, in the name of a start.

    When this returns the step exists. `Fenced` if that start is no longer the newest.
    """
    nonce, unix_s = secrets.token_hex(8), time.time()
    run.check_unchanged()
    point("record", step=manifest.step)
    done = run.log.append(
        lambda view: decide_commit(
            view,
            generation=generation,
            holder_nonce=holder_nonce,
            nonce=nonce,
            step=manifest.step,
            attempt=manifest.attempt,
            manifest_digest=run.digest(data).hex(),
            manifest_bytes=len(data),
            content_digest=manifest.content_digest.hex(),
            metrics=manifest.metrics,
            world=manifest.world.size,
            unix_s=unix_s,
            nbytes=sum(ref.data_bytes + ref.part_bytes for ref in manifest.parts) + len(data),
            sources=manifest.sources,
        )
    )
    point("commit", step=done.step, attempt=done.attempt, generation=done.generation)
    return done


def apply_retention(
    run: RunDirectory, keep: Keep | None, generation: int, holder_nonce: str, in_flight: Collection[str] = ()
) -> None:
    """In the name of the newest start: record what leaves under `keep` and what was asked to be deleted; delete it.

    Deletes nothing unless its record is durable; `Fenced` if a newer start has taken over.
    """
    if keep is None and not run.log.view.asked_to_delete():
        return
    run.check_unchanged()
    plan = plan_retention(run.log.read(), keep, run.attempts(), in_flight)
    carry_out(run, plan, generation, holder_nonce)


def carry_out(run: RunDirectory, plan: Plan, generation: int, holder_nonce: str) -> None:
    """Retire the attempts of `plan`, and delete the bytes of all that are retired.

    The newest first, so that no record retires what a step refers to that a later one would. An attempt whose bytes
    the store does not delete stays for the next time; the error is raised once all others are gone.
    """
    leaving = plan.attempts[::-1]
    if leaving:
        point("retire", attempts=list(leaving))
    for first in range(0, len(leaving), RETIRED_AT_ONCE):
        attempts, nonce = leaving[first : first + RETIRED_AT_ONCE], secrets.token_hex(8)
        run.log.append(
            partial(decide_retire, generation=generation, holder_nonce=holder_nonce, nonce=nonce, attempts=attempts)
        )
    failed: CkptError | None = None
    for name in run.attempts():
        if name in run.log.view.retired:
            try:
                _delete_attempt(run, name)
            except CkptError as error:
                failed = failed or error
    if failed is not None:
        raise failed


def _delete_attempt(run: RunDirectory, attempt: str) -> None:
    """Delete what we wrote; a file of somebody else stays, and the directory with it. Never follows a link."""
    directory = run.attempt_path(attempt)
    foreign = run.store.clear(directory, lambda name: _OURS.fullmatch(name) is not None)
    if foreign:
        log.warning("%s/%s holds what is not of this library, which stays: %s", run.url, directory, foreign[:8])


def find_commit(view: View, step: int | None) -> Commit:
    """The commit of `step` in the lineage (None: the head). `NotFound` names what there is."""
    lineage = view.standing()
    if step is None and lineage:
        return lineage[-1]
    for commit in lineage:
        if commit.step == step:
            return commit
    if any(commit.step == step for commit in view.standing_outside()):
        raise NotFound(
            f"step {step} of this run was left behind when it went back to an older one. `ckpt resume "
            f"--step {step} URL -- COMMAND` goes on from it all the same"
        )
    known = ", ".join(str(commit.step) for commit in lineage[-8:]) or "none"
    what = "checkpoint" if step is None else f"step {step}"
    raise NotFound(f"there is no {what} in this run; newest steps: {known}. `ckpt ls` lists all.")


def instead_of(run: RunDirectory, commit: Commit, *, chosen: bool) -> Commit | None:
    """What to read for a commit that retention has deleted meanwhile; None if it has not.

    `NotFound` if the caller had `chosen` that one.
    """
    view = run.log.read()
    if commit.attempt not in view.retired:
        return None
    if chosen:
        raise NotFound(
            f"step {commit.step} of {run.url} was deleted by retention while it was read; a state that it was read "
            f"into is partly overwritten. `ckpt ls {run.url}` lists what there is"
        )
    log.warning("step %d was deleted by retention while it was read: there are newer ones", commit.step)
    return find_commit(view, None)


def boot_id() -> str:
    """What tells the process ids seen here from all others: this boot, this namespace. Empty if it cannot be known."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def is_gone(holder: Start | None) -> bool:
    """Whether the holder's process certainly no longer runs: its id is one that is seen here, and nobody has it."""
    if holder is None or not holder.boot_id or holder.boot_id != boot_id() or holder.host != socket.gethostname():
        return False
    try:
        state = Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"  # dead, and not yet collected by its parent
