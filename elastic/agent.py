"""What one agent does about membership: events in, actions out. Pure; sockets, storage and clocks are `service`'s.

An agent that knows no leader seeks one: it asks those that come before it in order (the leader of the newest
generation, then that generation's members by rank, then newcomers by name), follows the first that answers, and is a
candidate if none does. Leader and candidate gather ready nodes; once `decide` allows it, they propose a membership,
which exists when its record stands in the run's log. Whoever loses its leader kills its workers first.

    working  --stop, failure, leader lost-->  stopping  --main thread waits-->  ready  --Go, own proposal-->  working
    working  --workers ended well-->  finished  --End-->  over
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from elastic.actions import (
    Action,
    Close,
    Exit,
    Follow,
    Kill,
    Look,
    Note,
    Propose,
    Release,
    Seek,
    Seen,
    Send,
)
from elastic.decide import Blame, Limits, Timing, arrange, may_take, would_grow
from elastic.membership import Member, Membership
from elastic.messages import (
    Down,
    End,
    Finished,
    Go,
    Hello,
    Job,
    Join,
    Ping,
    Ready,
    Refused,
    Share,
    Stop,
    Stopped,
    Up,
    Welcome,
)

EXIT_TOO_FEW = 75  # EX_TEMPFAIL: fewer nodes than MIN for too long
EXIT_REFUSED = 11  # another job has the run
PINGS_PER_TIMEOUT = 4


@dataclass
class Peer:
    """A node that follows us."""

    member: Member
    since: float
    heard_at: float
    ready: bool = False
    finished: bool = False


@dataclass
class Change:
    """The generation that we lead is over."""

    reason: str
    began_at: float


@dataclass
class Agent:
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
    upstream: str | None = None
    followers: dict[str, Peer] = field(default_factory=dict)
    shared: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._out: list[Action] = []
        self._blame = Blame()
        self._change: Change | None = None
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

    # What others may ask

    @property
    def leads(self) -> bool:
        """Whether the newest membership is ours to change."""
        return self.membership is not None and self.membership.leader == self.me.node and not self._abdicated

    def actions(self) -> list[Action]:
        """What is to be done since the last call, in order."""
        done, self._out = self._out, []
        return done

    # From the main thread

    def stopped(self, now: float, *, failed: bool) -> None:
        """The workers do not run any more. `failed`: they ended by themselves, and not well."""
        failed = failed and self.mine is not None
        self.mine = None
        if self.upstream is not None:
            self._send(None, Stopped(failed))
        elif self.leads and self._change is None:
            self._member_stopped(self.me, failed, now)

    def wait(self) -> None:
        """The main thread waits for a generation, and what the workers left is settled."""
        self.ready = True
        if self.upstream is not None:
            self._send(None, Ready())

    def finish(self) -> None:
        """The workers ended well, and the main thread waits for the others'."""
        self.finished, self.mine = True, None
        self._finished.add(self.me.node)
        if self.upstream is not None:
            self._send(None, Finished())

    def share(self, key: str, value: bytes) -> None:
        """Have every member of the generation know a value."""
        if self.membership is not None:
            self._share(Share(self.membership.generation, key, value))

    def _share(self, said: Share) -> None:
        if self.membership is None or said.generation != self.membership.generation:
            return
        if self.leads:
            self.shared[said.key] = said.value
            for node in self._member_followers():
                self._send(node, said)
        elif self.upstream is not None:
            self._send(None, said)

    # From other nodes

    def hello(self, said: Hello) -> Welcome | Refused:
        """The answer to a node that wants to know whether to follow us."""
        if said.job != self.job:
            differ = ", ".join(
                f"{name} {getattr(said.job, name)!r} instead of {getattr(self.job, name)!r}"
                for name in self.job.__struct_fields__
                if getattr(said.job, name) != getattr(self.job, name)
            )
            return Refused(f"it belongs to another job than {self.me.name} ({self.me.node}): {differ}")
        follows = self._known(self.upstream) if self.upstream is not None else None
        return Welcome(self.leads, self.seen.generation, follows, self.finished)

    def joined(self, said: Join, now: float) -> None:
        if self.upstream is not None or self.over:
            self._do(Close(said.me.node))
            return
        self.followers[said.me.node] = Peer(said.me, now, now, said.ready, said.finished)
        self._joined_at = now
        if said.finished:
            self._finished.add(said.me.node)
        self._do(Note(f"{said.me.name} ({said.me.node}) {'joins' if not self.leads else 'waits to join'}"))

    def heard(self, node: str, said: Up, now: float) -> None:
        """From a follower."""
        peer = self.followers.get(node)
        if peer is None:
            return
        peer.heard_at = now
        match said:
            case Stopped():
                if self.leads and self._change is None and self._is_member(node):
                    self._member_stopped(peer.member, said.failed, now)
            case Ready():
                peer.ready = True
            case Finished():
                peer.finished = True
                self._finished.add(node)
            case Share():
                self._share(said)
            case _:
                pass

    def told(self, said: Down, now: float) -> None:
        """From whom we follow."""
        self._upstream_heard_at = now
        match said:
            case Stop():
                self._kill(said.reason)
            case Go():
                self._go(said.membership)
            case Share():
                if self.membership is not None and said.generation == self.membership.generation:
                    self.shared[said.key] = said.value
            case End():
                self._end(said.code, said.reason)
            case Refused():
                self._end(EXIT_REFUSED, said.reason)
            case _:
                pass

    def lost(self, node: str | None, now: float, reason: str = "the connection was closed") -> None:
        """A follower, or (None) whom we follow, cannot be reached any more."""
        if node is None:
            if self.upstream is not None:
                name, self.upstream = self.upstream, None
                self._seek_at = now
                self._kill(f"lost {name}, which led: {reason}")
        elif peer := self.followers.pop(node, None):
            self._do(Note(f"lost {peer.member.name} ({node}): {reason}"))

    def sought(self, answers: Mapping[str, Welcome | Refused | None], now: float) -> None:
        """What the nodes that were asked said; None: nothing in time."""
        self._seeking = False
        self._seek_at = now + self.timing.seek_s
        if self.upstream is not None or self.leads:
            self._do(Follow(None))
            return
        refused = [said.reason for said in answers.values() if isinstance(said, Refused)]
        if refused:
            self._do(Follow(None))
            self._end(EXIT_REFUSED, refused[0])
            return
        welcomes = {node: said for node, said in answers.items() if isinstance(said, Welcome)}
        self._hints = {w.follows.node: w.follows for w in welcomes.values() if w.follows and w.follows != self.me}
        generation = self.seen.generation
        leaders = [node for node, w in welcomes.items() if w.leads and w.generation >= generation]
        free = {node: w for node, w in welcomes.items() if not w.leads and not w.follows and w.generation >= generation}
        before = [node for node, w in free.items() if (w.finished, self._order(node)) < self._own_order()]
        chosen = next(iter(leaders or before), None)
        self._candidate = chosen is None and not self._hints
        self._do(Follow(chosen))
        if chosen is not None:
            self._follow(chosen, now)

    def _follow(self, node: str, now: float) -> None:
        self.upstream, self._upstream_heard_at, self._candidate = node, now, False
        for follower in list(self.followers):
            self._do(Close(follower))
        self.followers.clear()
        self._change = None
        self._send(None, Join(self.me, self.ready, self.finished))

    # From storage

    def looked(self, seen: Seen, now: float) -> None:
        self._looking, self._looked = False, True
        moved = seen.counter != self.seen.counter or seen.generation != self.seen.generation
        gap = now - self._seen_at if self._seen_at is not None else 0.0
        # a long gap is time in which storage was away, perhaps for the leader too: it does not count
        self._quiet_s = 0.0 if moved else self._quiet_s + min(gap, self.timing.node_timeout_s / 2)
        self._seen_at = now
        if seen.generation < self.seen.generation:
            return
        old, self.seen = self.membership, seen
        if seen.done and seen.generation == self._gone_to:
            self._end(0, "the job is done")
        if seen.membership is None or seen.membership == old:
            return
        self.membership = seen.membership
        if old is not None and old.is_continued_by(seen.membership):
            if self.mine is not None:
                self.mine = seen.membership
        elif old is None or seen.membership.generation > old.generation:
            self._superseded()

    def _superseded(self) -> None:
        """A newer generation has begun without us."""
        self._kill("another generation has begun")
        self._change, self._abdicated = None, False
        for follower in list(self.followers):
            self._do(Close(follower))
        self.followers.clear()

    def refuse(self, reason: str) -> None:
        """Another job has the run, or the run is another one."""
        self._end(EXIT_REFUSED, reason)

    def look_failed(self, now: float) -> None:
        """Storage is away: what runs goes on, and nothing changes."""
        self._looking, self._seen_at = False, None

    def proposed(self, membership: Membership | None, now: float) -> None:
        """Our proposal stands in the log; None: it does not."""
        self._proposing = False
        if membership is None:
            self._looked_at, self._looked = 0.0, False  # somebody was faster, or storage is away: look first
            return
        self.membership = membership
        self.seen = replace(self.seen, generation=membership.generation, membership=membership, over=False)
        self.upstream, self._candidate, self._change = None, False, None
        self._began_at, self._short_since, self._grow = now, None, None
        self.shared.clear()
        for peer in self.followers.values():
            if membership.rank(peer.member.node) is not None:
                peer.ready = False
            self._send(peer.member.node, Go(membership))
        self._release(membership)

    # Time

    def tick(self, now: float) -> None:
        """To be called several times a second."""
        before, self._tick_at = self._tick_at, now
        if before is None:
            self._joined_at = now
        if self.over:
            return
        if before is not None and now - before > self.timing.node_timeout_s:
            self._stood_still(now, now - before)
        self._drop_silent(now)
        if self.upstream is None and now >= self._looked_at:
            self._look(now)
        if self.leads:
            self._lead(now)
        elif self.upstream is None:
            if not self._seeking and self._looked and now >= self._seek_at:
                self._seeking = True
                self._do(Seek(self._targets()))
            if self._candidate and self._looked:
                self._gather(now)

    def _stood_still(self, now: float, seconds: float) -> None:
        """Others have taken us for lost, rightly."""
        reason = f"this process stood still for {seconds:.1f} s"
        if self.upstream is not None:
            self._do(Close(None))
        self.lost(None, now, reason)
        for follower in list(self.followers):
            self._do(Close(follower))
            self.lost(follower, now, reason)
        self._kill(reason)
        self._quiet_s, self._seen_at = 0.0, None

    def _drop_silent(self, now: float) -> None:
        limit = self.timing.node_timeout_s
        if self.upstream is not None and now - self._upstream_heard_at > limit:
            self._do(Close(None))
            self.lost(None, now, f"it said nothing for {limit:g} s")
        for node, peer in list(self.followers.items()):
            if now - peer.heard_at > limit:
                self._do(Close(node))
                self.lost(node, now, f"it said nothing for {limit:g} s")
        if now - self._pinged_at >= limit / PINGS_PER_TIMEOUT:
            self._pinged_at = now
            for follower in self.followers:
                self._send(follower, Ping())
            if self.upstream is not None:
                self._send(None, Ping())

    def _look(self, now: float) -> None:
        if self._looking:
            return
        self._looking = True
        self._looked_at = now + (
            min(1.0, self.timing.node_timeout_s / PINGS_PER_TIMEOUT) if self.leads else self.timing.seek_s
        )
        pulse = self.membership.generation if self.membership and self.leads and self._reaches_half() else None
        self._do(Look(pulse, announce=not self.leads))

    def _reaches_half(self) -> bool:
        assert self.membership is not None
        here = {self.me.node, *self.followers} | self._finished
        return sum(node in here for node in self.membership.nodes) >= len(self.membership.members) / 2

    # Leading

    def _lead(self, now: float) -> None:
        assert self.membership is not None
        here = {self.me.node, *self.followers}
        absent = [node for node in self.membership.nodes if node not in here | self._finished]
        working = [node for node in self.membership.nodes if node in here - self._finished]
        if not working:
            self._finish_all()
            return
        if self._change is None:
            idle = [m for m in self.membership.members if self._is_ready(m.node)]
            if absent:
                names = [member.name for member in self.membership.members if member.node in absent]
                self._begin_change(f"lost {', '.join(names)}", now)
            elif idle:
                self._member_stopped(idle[0], False, now)
            elif self._should_grow(now):
                self._begin_change("larger membership", now)
        if self._change is not None and self.finished:
            self._abdicate()
        elif self._change is not None:
            self._gather(now)

    def _is_ready(self, node: str) -> bool:
        return self.ready if node == self.me.node else node in self.followers and self.followers[node].ready

    def _abdicate(self) -> None:
        """Our own workers have ended well and others must go on: whoever works on leads."""
        assert self.membership is not None
        self._abdicated, self._change = True, None
        self._do(Look(self.membership.generation, announce=False, over=True))
        for follower in list(self.followers):
            self._do(Close(follower))
        self.followers.clear()

    def _finish_all(self) -> None:
        for follower in self.followers:
            self._send(follower, End(0, "the job is done"))
        self._end(0, "the job is done")

    def _member_stopped(self, member: Member, failed: bool, now: float) -> None:
        if failed:
            self._blame = self._blame.after(member.node, now)
        self._begin_change(f"the workers of {member.name} {'failed' if failed else 'stopped'}", now)

    def _begin_change(self, reason: str, now: float) -> None:
        self._change = Change(reason, now)
        self._joined_at = now
        self._do(Note(f"generation {self.membership.generation if self.membership else 0} ends: {reason}"))
        for node in self._member_followers():
            self._send(node, Stop(reason))
        self._kill(reason)

    def _should_grow(self, now: float) -> bool:
        """Joiners end a generation that has lasted a while, right after a commit: that loses the fewest steps."""
        assert self.membership is not None
        waiting = [
            peer.member for peer in self.followers.values() if peer.ready and not self._is_member(peer.member.node)
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
        settled = (
            now - self._joined_at >= self.timing.join_window_s and now - self._began_at >= self.timing.min_interval_s
        )
        if not settled:
            self._grow = (self.seen.head, since)
            return False
        return self.seen.head != head or now - since >= self.timing.grow_wait_s

    # Gathering: the leader in a change, or a candidate

    def _gather(self, now: float) -> None:
        """Propose the next membership, if it may be and who is to be waited for is there."""
        if self.finished:
            self._gather_finished(now)
        if self._proposing or not self._looked or not self.ready or self.over:
            return
        self._drop_late(now)
        ready = {node: peer.member for node, peer in self.followers.items() if peer.ready}
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
        if self._should_wait(ready, now):
            return
        before = [m for m in self.membership.members if m.node not in self._finished] if self.membership else []
        limits = Limits(1, self.limits.maximum) if self._finished else self.limits  # the rest ends what is left
        group = [self.me, *ready.values()]
        chosen = arrange(before, group, limits, proposer=self.me.node, avoid=self._avoid(now))
        if not chosen:
            self._too_few(len(group), now)
            return
        reason = self._change.reason if self._change else verdict.reason
        self._proposing = True
        self._do(Propose(chosen, self.seen.generation, reason, verdict.leader_gone))

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
                self._do(Close(node))
                self.lost(node, now, "it did not stop its workers in time")

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
            for follower in self.followers:
                self._send(follower, End(EXIT_TOO_FEW, text))
            self._end(EXIT_TOO_FEW, f"{text}; nobody came within {self.timing.min_wait_s:g} s")

    # Small things

    def _avoid(self, now: float) -> Collection[str]:
        return self._blame.quarantined(
            now, failures=self.timing.quarantine_failures, window_s=self.timing.quarantine_window_s
        )

    def _go(self, membership: Membership) -> None:
        self.membership, self._gone_to = membership, membership.generation
        self.seen = replace(self.seen, generation=membership.generation, membership=membership, over=False)
        self.shared.clear()
        self._release(membership)

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

    def _targets(self) -> tuple[Member, ...]:
        """Whom to ask, in order: the leader, whom others follow, then who comes before us."""
        found: dict[str, Member] = {}
        leader = self.membership.member(self.membership.leader) if self.membership else None
        for member in (leader, *self._hints.values()):
            if member is not None:
                found[member.node] = member
        members = self.membership.members if self.membership else ()
        known = {member.node: member for member in (*members, *self.seen.announced)}
        for node in sorted(known, key=self._order):
            if self.finished or self._order(node) < self._order(self.me.node):
                found.setdefault(node, known[node])
        found.pop(self.me.node, None)
        return tuple(found.values())

    def _order(self, node: str) -> tuple[int, str]:
        rank = self.membership.rank(node) if self.membership else None
        return (rank, "") if rank is not None else (1 << 30, node)

    def _own_order(self) -> tuple[bool, tuple[int, str]]:
        return (self.finished, self._order(self.me.node))

    def _known(self, node: str) -> Member | None:
        members = self.membership.members if self.membership else ()
        return next((m for m in (*members, *self._hints.values(), *self.seen.announced) if m.node == node), None)

    def _is_member(self, node: str) -> bool:
        return self.membership is not None and self.membership.rank(node) is not None

    def _member_followers(self) -> list[str]:
        return [node for node in self.followers if self._is_member(node)]

    def _hold(self, text: str) -> None:
        if text.split(";")[0] != self._held:
            self._held = text.split(";")[0]
            self._do(Note(text))

    def _send(self, node: str | None, message: Up | Down) -> None:
        self._do(Send(node, message))

    def _do(self, action: Action) -> None:
        self._out.append(action)
