"""The half of an agent that leads: ends a generation, gathers who is ready, proposes the next membership. Pure.

`elastic.agent` has the other half, which hears and seeks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from elastic.actions import Action, Close, Exit, Forsake, Halt, Kill, Look, Note, Propose, Release, Seen, Send, Trace
from elastic.decide import Limits, Pace, Timing, arrange, may_take, stragglers, would_grow
from elastic.failures import NO_FAILURES, Failures, backoff_s
from elastic.membership import Member, Membership
from elastic.messages import Down, End, Inspect, Job, Leave, Lost, Pause, Stack, Stop, Up

EXIT_TOO_FEW = 75  # EX_TEMPFAIL: fewer nodes than MIN for too long
CORDONED = "it is cordoned (`elastic cordon --undo`)"
SLOW_IN_A_ROW = 2
EXIT_LEFT = 143  # this node left as planned, and the job is not done
HOPELESS_LIMIT = 2
EXIT_FRUITLESS = 76  # workers failed again and again, and nothing was committed in between


@dataclass
class Peer:
    """A node that follows us."""

    member: Member
    since: float
    heard_at: float
    ready: bool = False
    finished: bool = False
    leaving: str = ""  # why it is on its way out of the job


@dataclass
class Change:
    """The generation that we lead is over, or is about to be."""

    reason: str
    began_at: float


@dataclass
class Inspection:
    """The job hangs, and we ask everybody where their workers are."""

    reason: str
    began_at: float
    awaited: set[str]
    found: list[Stack] = field(default_factory=list)


@dataclass
class Leading:
    """What an agent knows, and what it does with it once it leads, or is a candidate."""

    me: Member
    job: Job
    limits: Limits
    timing: Timing
    seen: Seen = field(default_factory=Seen)
    membership: Membership | None = None  # the newest that we know
    mine: Membership | None = None  # the one that our workers run in
    ready: bool = False
    finished: bool = False
    over: bool = False
    leaving: str = ""  # why this node is on its way out of the job
    heeds: bool = False  # our workers stop where they are asked to
    upstream: str | None = None
    followers: dict[str, Peer] = field(default_factory=dict)
    shared: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._out: list[Action] = []
        self._failures = NO_FAILURES
        self._change: Change | None = None
        self._pause: Change | None = None  # its workers are asked to stop by themselves
        self._inspection: Inspection | None = None
        self._forsaken = False  # all were told that a member of this generation is lost
        self._seeking = self._looking = self._proposing = self._looked = self._candidate = False
        self._hints: dict[str, Member] = {}  # whom others follow
        self._finished: set[str] = set()  # members of the generation whose workers ended well, also if gone since
        self._abdicated = False
        self._gone_to = 0  # the newest generation that its leader told us of
        self._tick_at: float | None = None
        self._upstream_heard_at = self._pinged_at = self._looked_at = self._seek_at = 0.0
        self._quiet_s = 0.0  # how long the counter was seen to stand still
        self._seen_at: float | None = None  # the last look that succeeded, if none failed since
        self._joined_at = self._began_at = 0.0
        self._short_since: float | None = None
        self._grow: tuple[str | None, float] | None = None  # head when it was wanted first, and when
        self._held = ""
        self._paces: dict[int, Pace] = {}  # of each rank the newest
        self._suspects: dict[int, int] = {}  # how often in a row a rank was slow
        self._slow: dict[int, str] = {}  # what is said of ranks that are
        self._resume_at = 0.0  # no generation begins before

    # What others may ask

    @property
    def leads(self) -> bool:
        """Whether the newest membership is ours to change."""
        return self.membership is not None and self.membership.leader == self.me.node and not self._abdicated

    @property
    def _yields(self) -> bool:
        """Whether we lead only if nobody else does."""
        return self.finished or self._abdicated

    def actions(self) -> list[Action]:
        """What is to be done since the last call, in order."""
        done, self._out = self._out, []
        return done

    # Leading

    def _lead(self, now: float) -> None:
        assert self.membership is not None
        here = {self.me.node, *self.followers}
        absent = [node for node in self.membership.nodes if node not in here | self._finished]
        working = [node for node in self.membership.nodes if node in here - self._finished]
        if not working:
            self._finish_all()
            return
        self._dismiss(self.seen.drained)
        if absent and not self._forsaken:
            self._forsaken = True
            for node in self._member_followers():
                self._send(node, Lost())
            self._do(Forsake())
        if self._change is None:
            idle = [m for m in self.membership.members if self._is_ready(m.node)]
            if absent:
                names = [member.name for member in self.membership.members if member.node in absent]
                if not self._is_fruitless(0, now):
                    self._begin_change(f"lost {', '.join(names)}", now)
            elif idle:
                self._member_stopped(idle[0], False, now)
            elif self._inspection is not None:
                self._conclude(self._inspection, now)
            elif self._pause is not None:
                if now - self._pause.began_at > self.timing.pause_limit_s:
                    self._begin_change(f"{self._pause.reason}; the workers did not stop by themselves", now)
            elif reason := self._why_pause(now):
                self._begin_pause(reason, now)
        if self._change is not None and self.finished:  # our own workers have ended well
            self._abdicate()
        elif self._change is not None:
            self._gather(now)

    def _is_ready(self, node: str) -> bool:
        return self.ready if node == self.me.node else node in self.followers and self.followers[node].ready

    def _abdicate(self) -> None:
        """Others go on without us: whoever works on leads."""
        assert self.membership is not None
        self._abdicated, self._change, self._pause, self._inspection = True, None, None, None
        self._do(Look(self.membership.generation, announce=False, over=True))
        for follower in list(self.followers):
            self._do(Close(follower))
        self.followers.clear()

    def _finish_all(self) -> None:
        self._end_all(0, "the job is done")

    def _end_all(self, code: int, reason: str) -> None:
        for follower in self.followers:
            self._send(follower, End(code, reason))
        self._end(code, reason)

    def _member_stopped(self, member: Member, failed: bool, now: float, step: int = 0, hopeless: bool = False) -> None:
        if failed:
            self._failures = self._failures.blame(member.node, now)
            if self._is_fruitless(step, now, hopeless):
                return
        planned = self._pause is not None and not failed
        reason = f"the workers of {member.name} {'failed' if failed else 'stopped'}"
        self._begin_change(self._pause.reason if self._pause is not None and planned else reason, now)

    def _is_fruitless(self, step: int, now: float, hopeless: bool = False) -> bool:
        """Count a failure; whether it was the last that the job had. Of `hopeless` ones that is the second in a row."""
        self._failures = self._with_one_more(step, now)
        self._resume_at = now + backoff_s(self._failures.row)
        return self._gave_up(self._failures, hopeless)

    def _with_one_more(self, step: int, now: float) -> Failures:
        return self._failures.count(step, self.seen.head, soon=now - self._began_at < self.timing.fruitless_s)

    def _gave_up(self, found: Failures, hopeless: bool = False) -> bool:
        limit = min(self.timing.fruitless_limit, HOPELESS_LIMIT) if hopeless else self.timing.fruitless_limit
        if not limit or found.row < limit:
            return False
        where = f"after step {found.step}, always there" if found.step else "without a new step"
        self._end_all(EXIT_FRUITLESS, f"workers or nodes failed {found.row} times in a row {where}: see the log above")
        return True

    # A hang

    def _inspect(self, reason: str, now: float) -> None:
        """Ask all members where their workers are, before they are killed."""
        if self._change is not None or self._inspection is not None:
            return
        members = self._member_followers()
        self._inspection = Inspection(reason, now, {self.me.node, *members})
        self._do(Note(f"{reason}: all stacks are collected"))
        for node in members:
            self._send(node, Inspect())
        self._do(Trace())

    def _conclude(self, inspection: Inspection, now: float) -> None:
        """Once all have said where their workers are, or had the time for it: name those that wait for nobody."""
        late = now - inspection.began_at > self.timing.trace_limit_s
        if inspection.awaited & {self.me.node, *self.followers} and not late:
            return
        busy = [f"rank {s.rank} in {s.where}" for s in sorted(inspection.found, key=lambda s: s.rank) if not s.waits]
        named = ", ".join(busy[:8]) or "every rank that could say where it is waits in a collective"
        if not self._is_fruitless(0, now):
            self._begin_change(f"{inspection.reason}: {named}", now)

    def _said_stacks(self, node: str, found: tuple[Stack, ...]) -> None:
        if self._inspection is not None:
            self._inspection.awaited.discard(node)
            self._inspection.found += found

    # A straggler

    def _said_paces(self, name: str, found: tuple[Pace, ...]) -> None:
        """Name the ranks that others wait for, once they were slow several times in a row."""
        self._paces |= {pace.rank: pace for pace in found}
        slow = stragglers(self._paces.values())
        for pace in found:
            rank, times = pace.rank, self._suspects.get(pace.rank, 0) + 1
            if rank not in slow:
                self._suspects.pop(rank, None)
                self._slow.pop(rank, None)
                continue
            self._suspects[rank] = times
            text = f"rank {rank} on {name} is {slow[rank]:.1f} x the median of its own time"
            if times == SLOW_IN_A_ROW:
                self._do(Note(f"{text}: {pace.own_s:.3g} s of a step of {pace.step_s:.3g} s; the others wait for it"))
            if times >= SLOW_IN_A_ROW:
                self._slow[rank] = text

    def _why_pause(self, now: float) -> str:
        """Why the generation shall end as planned, if it shall."""
        assert self.membership is not None
        for member in self.membership.members:
            peer = self.followers.get(member.node)
            leaving = self.leaving if member == self.me else peer.leaving if peer is not None else ""
            if leaving:
                return f"{member.name} leaves: {leaving}"
        return "larger membership" if self._should_grow(now) else ""

    def _begin_pause(self, reason: str, now: float) -> None:
        """The workers stop at one step, save it, and say so; those that cannot are killed, as after a failure."""
        if not self.heeds or self.mine is None:
            self._begin_change(reason, now)
            return
        self._pause = Change(reason, now)
        self._do(Note(f"generation {self.membership.generation if self.membership else 0} is to end: {reason}"))
        for node in self._member_followers():
            self._send(node, Pause(reason))
        self._do(Halt(reason))

    def _dismiss(self, unwanted: Collection[str]) -> None:
        """Have followers of these names, or ourselves, leave the job."""
        for node, peer in self.followers.items():
            if not peer.leaving and {node, peer.member.name} & set(unwanted):
                peer.leaving = CORDONED
                self._send(node, Leave(CORDONED))
        if not self.leaving and {self.me.node, self.me.name} & set(unwanted):
            self.leaving = CORDONED

    def _begin_change(self, reason: str, now: float) -> None:
        self._change, self._pause, self._inspection = Change(reason, now), None, None
        self._joined_at = now
        self._do(Note(f"generation {self.membership.generation if self.membership else 0} ends: {reason}"))
        for node in self._member_followers():
            self._send(node, Stop(reason, self._failures.shifted(-now)))
        self._kill(reason)

    def _should_grow(self, now: float) -> bool:
        """Joiners end a generation that has lasted a while; right after a commit, if its workers must be killed."""
        assert self.membership is not None
        waiting = [
            peer.member
            for node, peer in self.followers.items()
            if peer.ready
            and not peer.leaving
            and not self._is_member(node)
            and not {node, peer.member.name} & self.seen.cordoned
        ]
        avoid = self._avoid(now)
        if not waiting or not would_grow(
            self.membership.members, waiting, self.limits, proposer=self.me.node, avoid=avoid
        ):
            self._grow = None
            return False
        if self._grow is None:
            self._grow = (self.seen.head, now)
        head, since = self._grow
        full = len(self.membership.members) + len(waiting) >= self.limits.maximum
        window_s = 0.0 if full else self.timing.join_window_s  # nobody else could work
        settled = now - self._joined_at >= window_s and now - self._began_at >= self.timing.min_interval_s
        if not settled:
            self._grow = (self.seen.head, since)
            return False
        return self.heeds or self.seen.head != head or now - since >= self.timing.grow_wait_s

    # Gathering: the leader in a change, or a candidate

    def _gather(self, now: float) -> None:
        """Propose the next membership, if it may be and who is to be waited for is there."""
        if self.finished:
            self._gather_finished(now)
        self._dismiss(self.seen.cordoned)
        if self._proposing or not self._looked or not self.ready or self.over or self.leaving:
            return
        self._drop_late(now)
        ready = {node: peer.member for node, peer in self.followers.items() if peer.ready and not peer.leaving}
        done = self._finished - {self.membership.leader if self.membership else ""}  # these will not work any more
        verdict = may_take(
            self.membership,
            self.me.node,
            {self.me.node, *ready, *done},
            quiet_s=self._quiet_s,
            known_gone=self.seen.over,
            node_timeout_s=self.timing.node_timeout_s,
        )
        if not verdict.may:
            self._hold(verdict.reason)
            return
        if now < self._resume_at:
            self._hold(f"{self._failures.row} failures without a new step: waiting for {self._resume_at - now:.0f} s")
            return
        if self._should_wait(ready, now):
            return
        avoid = self._avoid(now)
        if self.leads and self.me.node in avoid and self.limits.fit(len(ready.keys() - avoid)):
            self._do(Note(f"{self.me.name}, which leads, failed again and again: others go on, without it"))
            self._abdicate()
            return
        before = [m for m in self.membership.members if m.node not in self._finished] if self.membership else []
        limits = Limits(1, self.limits.maximum) if self._finished else self.limits  # the rest ends what is left
        group = [self.me, *ready.values()]
        chosen = arrange(before, group, limits, proposer=self.me.node, avoid=avoid)
        if not chosen:
            self._too_few(len(group), now)
            return
        reason = self._change.reason if self._change else verdict.reason
        found = self._failures
        if self.membership is not None and not any(self._is_member(member.node) for member in group):
            found = NO_FAILURES  # all are new: so is the job
        elif self.membership is not None and self._change is None and not self.seen.over:  # its leader died
            found = self._with_one_more(0, now)
            if self._gave_up(found):
                return
        self._proposing = True
        self._do(Propose(chosen, self.seen.generation, reason, verdict.leader_gone, found.shifted(-now)))

    def _gather_finished(self, now: float) -> None:
        """A candidate whose own workers ended well: if nobody is left to work, the job is done."""
        assert self.membership is not None
        quiet = self._quiet_s >= self.timing.node_timeout_s
        everyone = all(node in self._finished for node in self.membership.nodes)
        if all(peer.finished for peer in self.followers.values()) and (everyone or quiet):
            self._finish_all()

    def _drop_late(self, now: float) -> None:
        for node, peer in list(self.followers.items()):
            began = max(peer.since, self._change.began_at) if self._change is not None else peer.since
            if not peer.ready and not peer.finished and now - began > self.timing.stop_limit_s:
                self._let_go(node, "it did not stop its workers in time")

    def _should_wait(self, ready: Mapping[str, Member], now: float) -> bool:
        """Whether somebody is still to come, within the windows for that."""
        coming = [node for node, peer in self.followers.items() if not peer.ready and not peer.finished]
        if coming:
            self._hold(f"waiting for {', '.join(coming)}")
            return True
        if len(ready) + 1 >= self.limits.maximum and self.limits.fit(len(ready) + 1):
            return False
        old = self.membership.nodes if self.membership else ()
        here = {self.me.node, *self.followers} | self._finished
        if any(node in here for node in old):
            complete = all(node in here for node in old)
            return not complete and now - self._joined_at < self.timing.gather_s
        return now - self._joined_at < self.timing.join_window_s

    def _too_few(self, nodes: int, now: float) -> None:
        if self._short_since is None:
            self._short_since = now
        text = f"{nodes} nodes are here, at least {self.limits.minimum} are needed (--nnodes)"
        self._hold(text)
        if now - self._short_since >= self.timing.min_wait_s:
            self._end_all(EXIT_TOO_FEW, f"{text}; nobody came within {self.timing.min_wait_s:g} s")

    # Small things

    def _avoid(self, now: float) -> frozenset[str]:
        return self._failures.quarantined(
            now, failures=self.timing.quarantine_failures, window_s=self.timing.quarantine_window_s
        )

    def _release(self, membership: Membership) -> None:
        if membership.rank(self.me.node) is not None and self.ready:
            self.ready, self.mine = False, membership
            self._do(Release(membership))

    def _kill(self, reason: str) -> None:
        if self.mine is not None:
            self.mine = None
            self._do(Kill(reason))

    def _end(self, code: int, reason: str) -> None:
        self.over = True
        self._kill(reason)
        self._do(Exit(code, reason))

    def _let_go(self, node: str, reason: str) -> None:
        """A follower is lost to us, whether the connection still stands or not."""
        if peer := self.followers.pop(node, None):
            self._do(Close(node))
            self._do(Note(f"lost {peer.member.name} ({node}): {reason}"))

    def _is_member(self, node: str) -> bool:
        return self.membership is not None and self.membership.rank(node) is not None

    def _member_followers(self) -> list[str]:
        return [node for node in self.followers if self._is_member(node)]

    def _hold(self, text: str) -> None:
        """Note what keeps us from going on, once: not again for another number of seconds."""
        kind = "".join(c for c in text if not c.isdigit())
        if kind != self._held:
            self._held = kind
            self._do(Note(text))

    def _send(self, node: str | None, message: Up | Down) -> None:
        self._do(Send(node, message))

    def _do(self, action: Action) -> None:
        self._out.append(action)
