"""What one agent does about membership: events in, actions out. Pure; sockets, storage and clocks are `service`'s.

An agent that knows no leader seeks one: it asks those that come before it in order (the leader of the newest
generation, then that generation's members by rank, then newcomers by name), follows the first that answers, and is a
candidate if none does. Leader and candidate gather ready nodes; once `decide` allows it, they propose a membership,
which exists when its record stands in the run's log. Whoever loses its leader kills its workers first.

    working  --stop, failure, leader lost, pause-->  stopping  --main thread waits-->  ready  --Go, proposal-->  working
    working  --workers ended well-->  finished  --End-->  over
    ready, and leaving  -->  over
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from elastic.actions import (
    Close,
    Follow,
    Forsake,
    Halt,
    Look,
    Note,
    Seek,
    Seen,
    Trace,
)
from elastic.decide import Pace
from elastic.leading import EXIT_LEFT, Leading, Peer
from elastic.membership import Member, Membership
from elastic.messages import (
    Down,
    End,
    Finished,
    Go,
    Hello,
    Hung,
    Inspect,
    Join,
    Leave,
    Lost,
    Paces,
    Pause,
    Ping,
    Ready,
    Refused,
    Share,
    Stack,
    Stacks,
    Stop,
    Stopped,
    Up,
    Welcome,
)

EXIT_REFUSED = 11  # another job has the run
PINGS_PER_TIMEOUT = 4


class Agent(Leading):
    """An agent: tell it what happens, then carry out its `actions`."""

    # From the main thread

    def stopped(self, now: float, *, failed: bool, step: int = 0, hopeless: bool = False) -> None:
        """The workers do not run any more. `failed`: they ended by themselves, and not well, after `step` steps;
        `hopeless`: for what another start does not change.
        """
        failed = failed and self.mine is not None
        self.mine = None
        if self.upstream is not None:
            self._send(None, Stopped(failed, step, hopeless))
        elif self.leads and self._change is None:
            self._member_stopped(self.me, failed, now, step, hopeless)

    def wait(self) -> None:
        """The main thread waits for a generation, and what the workers left is settled."""
        self.ready = True
        if self.upstream is not None:
            self._send(None, Ready())

    def paused(self) -> None:
        """The workers have stopped where all ranks agreed, and that step is saved: nothing is lost by killing them."""
        self._kill("they stopped at an agreed step, which is saved")

    def hung(self, reason: str, now: float) -> None:
        """A worker of this node makes no step. To be said once for a set of workers."""
        if self.mine is None:
            return
        if self.upstream is not None:
            self._send(None, Hung(reason))
        elif self.leads:
            self._inspect(reason, now)

    def stacks(self, found: tuple[Stack, ...]) -> None:
        """Where the workers of this node are."""
        if self.upstream is not None:
            self._send(None, Stacks(found))
        else:
            self._said_stacks(self.me.node, found)

    def paces(self, found: tuple[Pace, ...]) -> None:
        """How fast the workers of this node were of late."""
        if self.upstream is not None:
            self._send(None, Paces(found))
        elif self.leads:
            self._said_paces(self.me.name, found)

    def leave(self, reason: str) -> None:
        """Take this node out of the job, as planned: its agent ends once its workers have. Idempotent."""
        if not self.leaving:
            self.leaving = reason
            self._do(Note(f"this node leaves: {reason}"))
            if self.upstream is not None:
                self._send(None, Leave(reason))

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
        if differ := self.job.differs(said.job):
            works = self.leads or self.upstream is not None or self.membership is not None
            return Refused(f"it belongs to another job than {self.me.name} ({self.me.node}): {differ}", works)
        follows = self._known(self.upstream) if self.upstream is not None else None
        return Welcome(self.leads, self.seen.generation, follows, self._yields)

    def joined(self, said: Join, now: float) -> None:
        if self.upstream is not None or self.over:
            self._do(Close(said.me.node))
            return
        self.followers[said.me.node] = Peer(said.me, now, now, said.ready, said.finished, said.leaving)
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
                    self._member_stopped(peer.member, said.failed, now, said.step, said.hopeless)
            case Ready():
                peer.ready = True
            case Finished():
                peer.finished = True
                self._finished.add(node)
            case Leave():
                peer.leaving = said.reason
            case Hung() if self.leads and self._is_member(node):
                self._inspect(said.reason, now)
            case Stacks():
                self._said_stacks(node, said.found)
            case Paces() if self.leads and self._is_member(node):
                self._said_paces(peer.member.name, said.found)
            case Share():
                self._share(said)
            case _:
                pass

    def told(self, said: Down, now: float) -> None:
        """From whom we follow."""
        self._upstream_heard_at = now
        match said:
            case Pause() if self.mine is not None:
                self._halt(said.reason)
            case Lost():
                self._do(Forsake())
            case Inspect() if self.mine is not None:
                self._do(Trace())
            case Leave():
                self.leaving = self.leaving or said.reason
            case Stop():
                self._failures = said.failures.shifted(now)
                self._kill(said.reason)
            case Go():
                self._go(said.membership, now)
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
                self._seek_at = self._joined_at = now
                self._kill(f"lost {name}, which led: {reason}")
                self._do(Forsake())
        else:
            self._let_go(node, reason)

    def sought(self, answers: Mapping[str, Welcome | Refused | None], now: float) -> None:
        """What the nodes that were asked said; None: nothing in time."""
        self._seeking = False
        self._seek_at = now + self.timing.seek_s
        if self.upstream is not None or self.leads:
            self._do(Follow(None))
            return
        refused = [
            said.reason
            for node, said in answers.items()  # of two jobs that begin at once, one stays
            if isinstance(said, Refused) and (said.works or self._order(node) < self._order(self.me.node))
        ]
        if refused:
            self._do(Follow(None))
            self._end(EXIT_REFUSED, refused[0])
            return
        welcomes = {node: said for node, said in answers.items() if isinstance(said, Welcome)}
        self._hints = {w.follows.node: w.follows for w in welcomes.values() if w.follows and w.follows != self.me}
        generation = self.seen.generation
        leaders = [node for node, w in welcomes.items() if w.leads and w.generation >= generation]
        free = {node: w for node, w in welcomes.items() if not w.leads and not w.follows and w.generation >= generation}
        before = [node for node, w in free.items() if (w.yields, self._order(node)) < self._own_order()]
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
        self._change = self._pause = self._inspection = None
        self._do(Note(f"follows {node}"))
        self._send(None, Join(self.me, self.ready, self.finished, self.leaving))

    def _halt(self, reason: str) -> None:
        if self.heeds:
            self._do(Halt(reason))
        else:
            self._kill(reason)

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
            self._failures = seen.membership.failures.shifted(now)
            self._superseded()

    def _superseded(self) -> None:
        """A newer generation has begun without us."""
        self._kill("another generation has begun")
        self._change, self._pause, self._inspection, self._abdicated = None, None, None, False
        for follower in list(self.followers):
            self._do(Close(follower))
        self.followers.clear()

    def refuse(self, reason: str, code: int = EXIT_REFUSED) -> None:
        """Another job has the run, or the run is another one."""
        self._end(code, reason)

    def look_failed(self, now: float) -> None:
        """Storage is away: what runs goes on, and nothing changes."""
        self._looking, self._seen_at = False, None

    def proposed(self, membership: Membership | None, now: float) -> None:
        """Our proposal stands in the log; None: it does not."""
        self._proposing = False
        if membership is None:
            self._looked_at, self._looked = 0.0, False  # somebody was faster, or storage is away: look first
            return
        self.membership, self._failures = membership, membership.failures.shifted(now)
        self.seen = replace(self.seen, generation=membership.generation, membership=membership, over=False)
        self.upstream, self._candidate, self._abdicated = None, False, False
        self._change = self._pause = self._inspection = None
        self._forsaken = False
        for paces in (self._paces, self._suspects, self._slow):
            paces.clear()
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
        if self.leaving and self.ready and not self.over:
            self._end(EXIT_LEFT, f"this node has left the job: {self.leaving}")
            return
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
            self._let_go(follower, reason)
        self._kill(reason)
        self._quiet_s, self._seen_at = 0.0, None

    def _drop_silent(self, now: float) -> None:
        limit = self.timing.node_timeout_s
        if self.upstream is not None and now - self._upstream_heard_at > limit:
            self._do(Close(None))
            self.lost(None, now, f"it said nothing for {limit:g} s")
        for node, peer in list(self.followers.items()):
            if now - peer.heard_at > limit:
                self._let_go(node, f"it said nothing for {limit:g} s")
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
        waiting = tuple(p.member.name for node, p in self.followers.items() if p.ready and not self._is_member(node))
        known = {self.me.node: self.me, **{node: peer.member for node, peer in self.followers.items()}}
        avoided = tuple(known[node].name for node in self._avoid(now) if node in known)
        slow = tuple(self._slow.values())
        self._do(Look(pulse, announce=not self.leads, waiting=waiting, avoided=avoided, slow=slow))

    def _reaches_half(self) -> bool:
        assert self.membership is not None
        here = {self.me.node, *self.followers} | self._finished
        return sum(node in here for node in self.membership.nodes) >= len(self.membership.members) / 2

    # Small things

    def _go(self, membership: Membership, now: float) -> None:
        self._failures, self._abdicated = membership.failures.shifted(now), False
        self.membership, self._gone_to, self._began_at = membership, membership.generation, now
        self.seen = replace(self.seen, generation=membership.generation, membership=membership, over=False)
        self.shared.clear()
        self._release(membership)

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
            if self._yields or self._order(node) < self._order(self.me.node):
                found.setdefault(node, known[node])
        found.pop(self.me.node, None)
        return tuple(found.values())

    def _order(self, node: str) -> tuple[int, str]:
        rank = self.membership.rank(node) if self.membership else None
        return (rank, "") if rank is not None else (1 << 30, node)

    def _own_order(self) -> tuple[bool, tuple[int, str]]:
        return (self._yields, self._order(self.me.node))

    def _known(self, node: str) -> Member | None:
        members = self.membership.members if self.membership else ()
        return next((m for m in (*members, *self._hints.values(), *self.seen.announced) if m.node == node), None)
