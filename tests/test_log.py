"""Records, what they add up to, and who may append: scripts, a gallery of hostile records, and random logs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from ckpt import errors
from ckpt.errors import CkptError, Corrupt, Fenced, Incompatible
from ckpt.log import HEAD, View, decide_commit, decide_pin, decide_retire, decide_start, decide_unpin, replay
from ckpt.records import (
    NAME_LIMIT,
    RECORD_LIMIT_BYTES,
    Commit,
    Entry,
    Pin,
    Record,
    Request,
    Retire,
    Start,
    Unknown,
    Unpin,
    attempt_name,
    decode_record,
    encode_record,
    is_incomplete,
    parse_attempt,
    parse_slot,
    seal,
    slot_name,
)


def a_start(**changes: Any) -> Start:
    start = Start(
        generation=1, nonce="n0", run_id=None, reason="new", base=None, host="node7", pid=7, boot_id="b", unix_s=1.5
    )
    return structs.replace(start, **changes)


def a_commit(step: int = 100, nonce: str = "a", **changes: Any) -> Commit:
    commit = Commit(
        generation=1,
        nonce=nonce,
        step=step,
        attempt=attempt_name(step, nonce),
        parent=None,
        manifest_digest="0badcafe",
        manifest_bytes=3,
        content_digest="ff00",
        metrics={},
        world=4,
        unix_s=2.5,
        nbytes=1 << 40,
    )
    return structs.replace(commit, **changes)


# The scripts. A line is a writer, a verb, arguments, and the error it must raise. An attempt is written <step>.<name>;
# a commit without a name is called after its writer. `expect` states what the log then says. `force` appends a commit
# without asking `decide_commit`, as a broken or hostile writer would.

SCRIPTS = {
    "a run and its restart": """
        w1 start                    ; expect generation=1 head=-
        w1 commit 100
        w1 commit 200               ; expect head=200.w1 lineage=100.w1,200.w1 outside=-
        w2 start                    ; expect generation=2 head=200.w1 lineage=100.w1,200.w1
        w2 commit 300               ; expect lineage=100.w1,200.w1,300.w2
    """,
    "a fenced writer commits nothing": """
        w1 start
        w1 commit 100
        w2 start
        w1 commit 200 -> Fenced
        w2 commit 150
        w1 commit 200 -> Fenced     ; expect lineage=100.w1,150.w2 ignored=0
        w1 retire 100.w1 -> Fenced
    """,
    "a stale commit that got into the log is not selected": """
        w1 start
        w1 commit 100
        w2 start
        force w1 commit 200 on=100.w1
        w2 commit 150               ; expect lineage=100.w1,150.w2 ignored=1
    """,
    "a commit must stand on the head, above it": """
        w1 start
        w1 commit 100
        w1 commit 200
        force w1 commit 300.x on=100.w1
        force w1 commit 150.y on=200.w1
        force w1 commit 200.z on=200.w1
        w1 commit 200.again -> Incompatible
        w1 commit 199 -> Incompatible
        w1 commit 201               ; expect lineage=100.w1,200.w1,201.w1 ignored=3
    """,
    "going back on purpose": """
        w1 start
        w1 commit 100
        w1 commit 200
        w1 commit 300
        w1 start base=100.w1 own    ; expect generation=2 head=100.w1 lineage=100.w1 outside=200.w1,300.w1
        w1 commit 200.b             ; expect lineage=100.w1,200.b outside=200.w1,300.w1
        w2 start                    ; expect head=200.b
        w2 start base=300.w1        ; expect lineage=100.w1,200.w1,300.w1 outside=200.b
        w2 commit 400               ; expect lineage=100.w1,200.w1,300.w1,400.w2
    """,
    "going back takes being the holder": """
        w1 start
        w1 commit 100
        w1 commit 200
        w2 start
        w1 start base=100.w1 own -> Fenced
        w2 commit 300               ; expect lineage=100.w1,200.w1,300.w2 generation=2
    """,
    "from nothing": """
        w1 start
        w1 commit 100
        w2 start base=none          ; expect head=- outside=100.w1
        w2 commit 50                ; expect lineage=50.w2 outside=100.w1
    """,
    "a base must be a commit that is still there": """
        w1 start
        w1 commit 100
        w1 commit 200
        w2 start base=150.w1 -> NotFound
        w1 retire 100.w1
        w2 start base=100.w1 -> NotFound
        w2 start base=200.w1        ; expect lineage=100.w1,200.w1 retired=100.w1
    """,
    "a new generation adopts what its predecessor left complete": """
        w1 start
        w1 commit 100
        w2 start
        w2 commit 200.w1            ; expect lineage=100.w1,200.w1 generation=2
        w1 commit 200.w1 -> Fenced
        w2 commit 200.w1 -> Incompatible
        w2 commit 300               ; expect lineage=100.w1,200.w1,300.w2 ignored=0
    """,
    "a holder with another run id": """
        w1 start run=job-1
        w1 commit 100
        w2 start run=job-2 -> Fenced
        w2 start run=job-2 gone     ; expect generation=2
        w3 start run=job-3 takeover ; expect generation=3
        w4 start run=job-3          ; expect generation=4
        w5 start                    ; expect generation=5
        w6 start run=job-6          ; expect generation=6 head=100.w1
    """,
    "two start at once: the loser expected the generation it read": """
        w1 start
        w1 commit 100
        w2 start expect=1
        w3 start expect=1 -> Fenced ; expect generation=2
    """,
    "pins and retention": """
        w1 start
        w1 commit 100
        w1 commit 200
        w1 commit 300
        w1 pin 100.w1 paper
        w1 pin 150.w1 paper -> NotFound
        w1 retire 100.w1 -> Incompatible
        w1 retire 300.w1 -> Incompatible
        w1 retire 200.w1 250.failed ; expect retired=200.w1,250.failed pins=paper:100.w1
        w1 pin 300.w1 paper
        w1 retire 100.w1            ; expect retired=100.w1,200.w1,250.failed pins=paper:300.w1
        w1 pin 100.w1 old -> NotFound
        w1 unpin old -> NotFound
        w1 unpin paper              ; expect pins=
    """,
    "anyone may pin, and fences nobody": """
        w1 start
        w1 commit 100
        w2 pin 100.w1 paper         ; expect generation=1 pins=paper:100.w1
        w1 commit 200
        w1 retire 100.w1 -> Incompatible
        w2 unpin paper
        w1 retire 100.w1            ; expect retired=100.w1 ignored=0
        forged 100.w1 late          ; expect pins= ignored=1
    """,
    "what is referred to stays": """
        w1 start
        w1 commit 100
        w1 commit 200 from=100.w1
        w1 commit 300 from=100.w1
        w1 retire 100.w1 -> Incompatible
        w1 retire 200.w1            ; expect retired=200.w1
        w1 commit 400 from=200.w1 -> Incompatible
        w1 commit 400 from=150.w1 -> Incompatible
        force w1 commit 400 on=300.w1 from=200.w1
        w1 commit 500               ; expect lineage=100.w1,200.w1,300.w1,500.w1 ignored=1
        w1 retire 100.w1 300.w1     ; expect retired=100.w1,200.w1,300.w1
    """,
    "slots without effect": """
        void
        w1 start                    ; expect generation=1 ignored=1
        unknown
        w1 commit 100
        void
        w1 commit 200               ; expect lineage=100.w1,200.w1 ignored=3 next_slot=6
    """,
}


@dataclass
class Script:
    """Runs the lines of a script against the real deciders."""

    view: View = field(default_factory=View)
    held: dict[str, tuple[int, str]] = field(default_factory=dict)  # writer -> generation, nonce of its start

    def run(self, text: str) -> None:
        for line in filter(None, map(str.strip, text.splitlines())):
            action, _, expectation = (part.strip() for part in line.partition(";"))
            action, _, error = (part.strip() for part in action.partition("->"))
            try:
                if error:
                    with pytest.raises(getattr(errors, error)):
                        self.act(action.split())
                else:
                    self.view = self.view.after(self.act(action.split()))
                for stated in expectation.split()[1:]:
                    key, _, value = stated.partition("=")
                    assert self.says(key) == value, key
            except (AssertionError, CkptError) as problem:
                problem.add_note(f"in line: {line}")
                raise

    def act(self, words: list[str]) -> Entry:
        if words == ["void"]:
            return None
        if words == ["unknown"]:
            return Unknown("later", "u")
        if words[0] == "forged":
            return Pin(nonce="f", attempt=attempt(words[1]), name=words[2])
        if words[0] == "force":
            return self.force(words[1], words[3:])
        writer, verb, arguments = words[0], words[1], words[2:]
        return {
            "start": self.start,
            "commit": self.commit,
            "pin": self.pin,
            "unpin": self.unpin,
            "retire": self.retire,
        }[verb](writer, arguments)

    def start(self, writer: str, arguments: list[str]) -> Record:
        options = dict(argument.partition("=")[::2] for argument in arguments)
        expected = self.held[writer][0] if "own" in options else int(options["expect"]) if "expect" in options else None
        base = options.get("base", HEAD)
        start = decide_start(
            self.view,
            nonce=f"{writer}s{self.view.next_slot}",
            run_id=options.get("run"),
            reason="script",
            base=None if base == "none" else attempt(base) if base != HEAD else HEAD,
            takeover="takeover" in options,
            holder_gone="gone" in options,
            expected_generation=expected,
        )
        self.held[writer] = (start.generation, start.nonce)
        return start

    def commit(self, writer: str, arguments: list[str]) -> Record:
        name, more = attempt(arguments[0], writer), sources(arguments[1:])
        commit = a_commit(step=int(name.split(".")[0]), attempt=name, nonce=f"c{self.view.next_slot}", sources=more)
        fields = structs.asdict(commit)
        del fields["parent"]
        return decide_commit(self.view, **(fields | self.as_holder(writer)))

    def pin(self, writer: str, arguments: list[str]) -> Record:
        nonce = f"p{self.view.next_slot}"
        return decide_pin(self.view, attempt=attempt(arguments[0]), name=arguments[1], nonce=nonce)

    def unpin(self, writer: str, arguments: list[str]) -> Record:
        return decide_unpin(self.view, name=arguments[0], nonce=f"u{self.view.next_slot}")

    def retire(self, writer: str, arguments: list[str]) -> Record:
        nonce = f"r{self.view.next_slot}"
        return decide_retire(self.view, attempts=map(attempt, arguments), nonce=nonce, **self.as_holder(writer))

    def force(self, writer: str, arguments: list[str]) -> Record:
        name, parent = attempt(arguments[0], writer), attempt(arguments[1].removeprefix("on="))
        step, nonce, generation = int(name.split(".")[0]), f"f{self.view.next_slot}", self.held[writer][0]
        more = sources(arguments[2:])
        return a_commit(step=step, attempt=name, nonce=nonce, generation=generation, parent=parent, sources=more)

    def as_holder(self, writer: str) -> dict[str, Any]:
        generation, nonce = self.held[writer]
        return {"generation": generation, "holder_nonce": nonce}

    def says(self, key: str) -> str:
        view = self.view
        if key == "head":
            return short(view.head.attempt) if view.head else "-"
        if key in ("lineage", "outside"):
            return ",".join(short(commit.attempt) for commit in getattr(view, key)()) or "-"
        if key == "retired":
            return ",".join(sorted(map(short, view.retired)))
        if key == "pins":
            return ",".join(f"{name}:{short(pin.attempt)}" for name, pin in view.pins.items())
        return str(len(view.ignored) if key == "ignored" else getattr(view, key))


def attempt(text: str, writer: str = "") -> str:
    step, _, name = text.partition(".")
    return attempt_name(int(step), name or writer)


def sources(arguments: list[str]) -> tuple[str, ...]:
    return tuple(attempt(argument.removeprefix("from=")) for argument in arguments)


def short(name: str) -> str:
    step, _, nonce = name.partition(".")
    return f"{int(step)}.{nonce}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name: str) -> None:
    Script().run(SCRIPTS[name])


def test_messages_say_what_to_do_next() -> None:
    script = Script()
    script.run("w1 start run=job-1\nw1 commit 100")
    with pytest.raises(Incompatible, match=r"restore\(state, step=N\).*below 100"):
        script.commit("w1", ["100.b"])
    with pytest.raises(Fenced, match=r"job-1.*job-2.*Nothing was changed.*takeover=True"):
        script.start("w2", ["run=job-2"])
    script.run("w2 start run=job-1")
    with pytest.raises(Fenced, match=r"generation 1, but the current one is 2.*stop this process"):
        script.commit("w1", ["200"])


# Encoding


def _patched(**changes: Any) -> bytes:
    fields = json.loads(encode_record(a_commit(metrics={"loss": 1.0})))
    del fields["digest"]
    return _sealed(json.dumps(fields | changes).encode())


def _sealed(text: bytes) -> bytes:
    """A record that says what `text` says and matches its own digest."""
    return text.removesuffix(b"}") + seal(text.removesuffix(b"}"))


HOSTILE = {
    "empty": b"",
    "cut off": encode_record(a_start())[:-1],
    "not JSON": b"{]\n",
    "not UTF-8": b'{"kind":"start","nonce":"\xff"}\n',
    "another digest": encode_record(a_commit()).replace(b'"step":100', b'"step":101'),
    "no digest": b'{"kind":"later","nonce":"a"}\n',
    "not an object": _sealed(b"[1]"),
    "nested deeply": _sealed(b'{"kind":"later","nonce":"a","x":' + b"[" * 60000),
    "no kind": _sealed(b'{"nonce":"a"}'),
    "kind of another type": _sealed(b'{"kind":[],"nonce":"a"}'),
    "no nonce": _sealed(b'{"kind":"later"}'),
    "too large": b'{"kind":"start","nonce":"a","x":"' + b"x" * RECORD_LIMIT_BYTES + b'"}\n',
    "missing field": _sealed(b'{"kind":"pin","nonce":"a","name":"x"}'),
    "path in the attempt": _patched(attempt="000000100.a/../../etc"),
    "dots only": _patched(attempt="000000100..."),
    "attempt in capitals": _patched(attempt="000000100.A"),
    "attempt of another step": _patched(attempt="000000101.a"),
    "attempt padded otherwise": _patched(attempt="0000000100.a"),
    "long attempt": _patched(attempt="000000100." + "a" * NAME_LIMIT),
    "hidden nonce": _patched(nonce=".a"),
    "nonce with a newline": _patched(nonce="a\n"),
    "negative step": _patched(step=-1),
    "huge step": _patched(step=2**63),
    "step with a fraction": _patched(step=100.5),
    "step as text": _patched(step="100"),
    "step as truth": _patched(step=True),
    "generation zero": _patched(generation=0),
    "digest that is none": _patched(manifest_digest="../../x"),
    "digest of odd length": _patched(content_digest="abc"),
    "parent that is none": _patched(parent="../x"),
    "metric as text": _patched(metrics={"loss": "Infinity"}),
    "metric as null": _patched(metrics={"loss": None}),
    "metric as truth": _patched(metrics={"loss": True}),
    "huge metric": _patched(metrics={"loss": 10**400}),
    "metrics as list": _patched(metrics=[1.0]),
    "time that is none": _patched(unix_s=None),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_record_is_corrupt(name: str) -> None:
    with pytest.raises(Corrupt):
        decode_record(HOSTILE[name])


def test_unknown_fields_and_kinds_of_later_minor_versions() -> None:
    assert decode_record(_patched(later=[1, 2])) == a_commit(metrics={"loss": 1.0})
    assert decode_record(_sealed(b'{"kind":"later","nonce":"a","generation":{}}')) == Unknown("later", "a")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -0.0, 5e-324, 0.1, 1e308, 3])
def test_metrics_survive_exactly(value: float) -> None:
    data = encode_record(a_commit(metrics={"m": value}))
    json.loads(data, parse_constant=pytest.fail)
    commit = decode_record(data)
    assert isinstance(commit, Commit)
    assert repr(commit.metrics["m"]) == repr(float(value))


def test_what_breaks_a_rule_is_not_written() -> None:
    for record in (
        a_commit(attempt="../x"),
        a_commit(step=101, attempt="000000100.a"),
        a_start(nonce="A"),
        a_start(unix_s=math.inf),
        a_start(reason="x" * RECORD_LIMIT_BYTES),
    ):
        with pytest.raises(ValueError, match="cannot write this"):
            encode_record(record)


def test_names() -> None:
    assert slot_name(42) == "0000000042.json"
    assert parse_slot("0000000042.json") == 42
    assert {parse_slot(name) for name in ("42.json", "0000000042.json.tmp", ".0000000042.json", "")} == {None}
    assert attempt_name(12000, "4f2a") == "000012000.4f2a"
    assert parse_attempt("000012000.4f2a") == (12000, "4f2a")
    assert parse_attempt(attempt_name(2**63 - 1, "a.b-c_d")) == (2**63 - 1, "a.b-c_d")
    for step, nonce in ((-1, "a"), (2**63, "a"), (1, ""), (1, ".a"), (1, "A"), (1, "a/b"), (1, "a" * NAME_LIMIT)):
        with pytest.raises(ValueError, match="no attempt can be named"):
            attempt_name(step, nonce)
    with pytest.raises(ValueError, match="outside"):
        slot_name(10**10)


# Random records and logs

_names = st.sampled_from(["a", "b", "c"])
_steps = st.integers(0, 4)
_attempts = st.builds(attempt_name, _steps, _names)
_generations = st.integers(1, 4)
_starts = st.builds(
    a_start,
    generation=_generations,
    nonce=_names,
    run_id=st.none() | st.text(max_size=5),
    base=st.none() | _attempts,
    unix_s=st.floats(allow_nan=False, allow_infinity=False),
    addresses=st.lists(st.text(max_size=5)).map(tuple),
)
_commits = st.builds(
    a_commit,
    step=_steps,
    nonce=_names,
    generation=_generations,
    parent=st.none() | _attempts,
    metrics=st.dictionaries(st.text(max_size=5), st.floats()),
)
_records: st.SearchStrategy[Record] = st.one_of(
    _starts,
    _commits,
    st.builds(Pin, nonce=_names, attempt=_attempts, name=_names),
    st.builds(Unpin, nonce=_names, name=_names),
    st.builds(Retire, generation=_generations, nonce=_names, attempts=st.lists(_attempts).map(tuple)),
    st.builds(Request, nonce=_names, verb=_names, arguments=st.dictionaries(st.text(max_size=5), st.text(max_size=5))),
)
_entries: st.SearchStrategy[Entry] = st.one_of(_records, st.just(None), st.builds(Unknown, _names, _names))


@given(_records)
def test_records_round_trip(record: Record) -> None:
    data = encode_record(record)
    assert repr(decode_record(data)) == repr(record)
    assert all(is_incomplete(data[:length]) for length in range(len(data)))


@given(_records, st.data())
def test_damaged_records_are_corrupt_or_another_valid_record(record: Record, data: st.DataObject) -> None:
    raw = bytearray(encode_record(record))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_record(bytes(raw))
    except Corrupt:
        return
    if not isinstance(decoded, Unknown):
        encode_record(decoded)  # it obeys every rule


@given(st.binary(max_size=200))
def test_noise_is_corrupt(noise: bytes) -> None:
    with pytest.raises(Corrupt):
        decode_record(noise + b"\n")


@settings(max_examples=300)
@given(st.lists(_entries, max_size=30), st.integers(0, 30))
def test_any_log_has_one_view(entries: list[Entry], cut: int) -> None:
    view = replay(entries)
    assert repr(replay(entries[:cut]).extend(entries[cut:])) == repr(view)
    assert view.next_slot == len(entries)
    assert view.generation == len(view.starts)
    steps = [commit.step for commit in view.lineage()]
    assert steps == sorted(set(steps))
    assert sorted(commit.attempt for commit in (*view.lineage(), *view.outside())) == sorted(view.commits)
    assert (view.lineage() or (None,))[-1] is view.head


def test_earlier_views_do_not_change() -> None:
    before = replay([a_start()])
    after = before.after(a_commit())
    assert not before.commits
    assert before.head is None
    assert list(after.commits) == ["000000100.a"]
    with pytest.raises(TypeError):
        after.commits["x"] = a_commit()  # type: ignore[index]


def test_a_start_that_skips_or_repeats_a_generation_does_not_count() -> None:
    view = replay([a_start(), a_commit(), a_start(generation=3), a_start(generation=1), a_start(generation=2)])
    assert [ignored.slot for ignored in view.ignored] == [2, 3]
    assert (view.generation, view.head) == (2, None)


def test_wire_form_is_what_the_format_says() -> None:
    assert encode_record(a_start()) == (
        b'{"kind":"start","generation":1,"nonce":"n0","run_id":null,"reason":"new","base":null,"host":"node7",'
        b'"pid":7,"boot_id":"b","unix_s":1.5,"addresses":[],"members":[],'
        b'"digest":"786ad518609d3ba17137f9e5107d1ac3"}\n'
    )
