"""The report of a run: one JSON document, and the same as one HTML page that needs nothing else. Pure."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from elastic.evidence import Evidence, Judgement, Mark, passed
from elastic.goodput import KINDS, Instant, Span, spans, split

WIDTH, LEFT, ROW, BAR = 1000, 56, 44, 18
TICKS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)
TICKS_LIMIT = 12
WORDS = {
    "productive": "new steps", "recompute": "steps computed again", "saving": "blocked by saving",
    "detection": "until the fault was noticed", "rendezvous": "rendezvous and start", "restore": "restore",
    "ending": "after the last step",
}  # fmt: skip


def document(evidence: Evidence, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Everything: verdict, figures, oracles, and the evidence but for the echoes."""
    return {
        "passed": passed(judgements),
        "figures": figures(evidence),
        "oracles": [asdict(one) for one in judgements],
        **evidence.as_json(),
    }


def figures(evidence: Evidence) -> dict[str, Any]:
    """The numbers that a reader looks for first. Seconds, and counts."""
    totals = split(spans(_instants(evidence), evidence.seconds))
    recoveries = sorted(f.recovered_at - f.at for f in evidence.faults if f.recovered_at is not None)
    steps = {mark.step for mark in evidence.named("step")}
    made = sum(1 for mark in evidence.named("step") if mark.rank == 0)
    return {
        "seconds": round(evidence.seconds, 2),
        "goodput": round(totals["productive"] / evidence.seconds, 4) if evidence.seconds else 0.0,
        "split_s": {kind: round(value, 2) for kind, value in totals.items()},
        "faults": len(evidence.faults),
        "generations": len({mark.generation for mark in evidence.named("join", "step")}),
        "steps": len(steps),
        "steps_computed_again": made - len(steps),
        "median_recovery_s": round(recoveries[len(recoveries) // 2], 2) if recoveries else None,
        "worst_recovery_s": round(recoveries[-1], 2) if recoveries else None,
    }


def _instants(evidence: Evidence) -> list[Instant]:
    whats = {"step": "step", "saved": "saved", "decide": "decide", "restoring": "restoring", "restore": "restored"}
    return [
        Instant(mark.at, whats[mark.name], mark.step, mark.facts.get("blocked_s", 0.0))  # type: ignore[arg-type]
        for mark in evidence.named(*whats)
        if mark.rank in (0, -1)  # agents have no rank
    ]


def page(evidence: Evidence, judgements: Sequence[Judgement], style: str, found: dict[str, Any] | None = None) -> str:
    """The page; `style` is the sheet that goes into it, `found` its figures. Without judgements it gives no verdict."""
    found, ok = found or figures(evidence), passed(judgements)
    scenario = evidence.scenario
    recovery = found["worst_recovery_s"]
    cards = [
        (f"{found['goodput']:.0%}", "of the time made new steps"),
        (str(found["faults"]), "faults injected" if judgements else "failures"),
        ("–" if recovery is None else f"{recovery:g} s", "worst recovery"),
        (str(found["steps_computed_again"]), f"of {found['steps']} steps computed again"),
        (str(found["generations"]), "generations"),
        (f"{found['seconds']:.0f} s", "in all"),
    ]
    split_s = found["split_s"]
    verdict, how = ("green", "passed") if ok else ("red", "failed")
    badge, title, about, oracles = "", scenario["name"], f"{scenario['nodes']} nodes", ""
    if judgements:
        badge = f'<span class="verdict {verdict}">{how}</span>'
        title += ": survived" if ok else ": not survived"
        about = (
            f"<code>{_(' '.join(evidence.command))}</code> on {scenario['nodes']} nodes ({_(evidence.ground)}), "
            f"seed {evidence.seed}"
        )
        oracles = f"<section><h2>Oracles</h2>{_oracles(judgements)}</section>"
    values = "".join(f"<div><b>{_(value)}</b><span>{_(text)}</span></div>" for value, text in cards)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_(title)}</title><style>{style}</style></head><body><main>
<header>{badge}<h1>{_(scenario["name"])}</h1><p>{_(scenario["title"])}</p>
<p class="dim">{about}</p></header>
<section class="cards">{values}</section>
<section><h2>What happened</h2>{_timeline(evidence)}{_legend()}</section>
<section><h2>Where the time went</h2>{_split(split_s, evidence.seconds)}</section>
<section><h2>Faults</h2>{_faults(evidence)}</section>
{oracles}
</main></body></html>
"""


def _timeline(evidence: Evidence) -> str:
    """One row for each node: when it ran, in which generations it trained, what befell it."""
    end = max(evidence.seconds, 0.001)
    nodes = list(dict.fromkeys(life.node for life in evidence.lives))
    height = ROW * (len(nodes) + 1) + 30

    def x(at: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * min(at, end) / end

    parts = [f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="0" y2="{height - 24}"/>'
             f'<text class="tick" x="{x(t):.1f}" y="{height - 8}">{t} s</text>' for t in _ticks(end)]  # fmt: skip
    for row, node in enumerate(nodes):
        y = row * ROW + 12
        parts.append(f'<text class="name" x="0" y="{y + BAR - 4}">{_(node)}</text>')
        parts += [
            _bar("life", x(life.began), x(end if life.ended is None else life.ended), y, life.taken or "runs")
            for life in evidence.lives
            if life.node == node
        ]
        for generation, first, last in _trained(evidence, node):
            text = f"generation {generation}: steps from {first.at:.1f} to {last.at:.1f} s"
            parts.append(_bar(f"train g{generation % 2}", x(first.at), max(x(last.at), x(first.at) + 2), y, text))
            parts.append(f'<text class="gen" x="{x(first.at) + 4:.1f}" y="{y + BAR - 5}">{generation}</text>')
        restores = [mark for mark in evidence.named("restore") if mark.node == node]
        parts += [_tick("restore", x(m.at), y, f"restored step {m.step} at {m.at:.1f} s") for m in restores]
        for fault in (fault for fault in evidence.faults if node in fault.nodes):
            if fault.healed_at is not None:
                parts.append(_bar("lasting", x(fault.at), x(fault.healed_at), y + BAR + 3, f"{fault.kind} lasts", 4))
            parts.append(f'<g class="fault"><title>{fault.at:.1f} s: {_(fault.what)}</title>'
                         f'<path d="M{x(fault.at):.1f} {y - 2} l-6 -9 h12 z"/></g>')  # fmt: skip
    y = len(nodes) * ROW + 12
    parts.append(f'<text class="name" x="0" y="{y + BAR - 4}">time</text>')
    for span in _merged(spans(_instants(evidence), evidence.seconds)):
        parts.append(
            _bar(span.kind, x(span.start), x(span.stop), y, f"{WORDS[span.kind]} {span.stop - span.start:.1f} s")
        )
    parts += [_tick("commit", x(m.at), y + BAR, f"step {m.step} committed") for m in evidence.named("commit")]
    return f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg></div>'


def _bar(kind: str, start: float, stop: float, y: float, text: str, height: float = BAR) -> str:
    width = max(stop - start, 0.5)
    place = f'x="{start:.1f}" y="{y}" width="{width:.1f}" height="{height}" rx="2"'
    return f'<rect class="{kind}" {place}><title>{_(text)}</title></rect>'


def _tick(kind: str, x: float, y: float, text: str) -> str:
    return f'<rect class="{kind}" x="{x - 1:.1f}" y="{y}" width="2" height="{BAR if kind == "restore" else 6}">' + (
        f"<title>{_(text)}</title></rect>"
    )


def _trained(evidence: Evidence, node: str) -> list[tuple[int, Mark, Mark]]:
    """The generations in which a node made steps, and its first and last there."""
    marks: dict[int, list[Mark]] = {}
    for mark in evidence.named("restore", "step"):
        if mark.node == node:
            marks.setdefault(mark.generation, []).append(mark)
    return [(generation, found[0], found[-1]) for generation, found in sorted(marks.items())]


def _merged(found: Iterable[Span]) -> list[Span]:
    """Neighbours of one kind as one: a span a step is more than a page can show. Saving, in between, stays."""
    merged: list[Span] = []
    for span in found:
        if merged and merged[-1].kind == span.kind:
            merged[-1] = Span(span.kind, merged[-1].start, span.stop)
        else:
            merged.append(span)
    return merged


def _ticks(end: float) -> range:
    every = next((tick for tick in TICKS if end / tick <= TICKS_LIMIT), TICKS[-1])
    return range(0, int(end) + 1, every)


def _legend() -> str:
    words = {**WORDS, "train g0": "trains (number: generation)", "life": "agent runs", "commit": "a step is committed"}
    items = [f'<span><i class="{kind}"></i>{_(text)}</span>' for kind, text in words.items()]
    return f'<p class="legend">{"".join(items)}<span><i class="mark"></i>fault, and how long it lasts</span></p>'


def _split(seconds: dict[str, float], total: float) -> str:
    shares = [(kind, seconds[kind] / total if total else 0.0) for kind in KINDS]
    bar = "".join(f'<i class="{kind}" style="width:{share:.2%}"></i>' for kind, share in shares)
    rows = [[f'<i class="dot {kind}"></i>{_(WORDS[kind])}', f"{seconds[kind]:.1f} s", f"{share:.1%}"]
            for kind, share in shares]  # fmt: skip
    return f'<div class="split">{bar}</div>{_table(("spent on", ">seconds", ">share"), rows)}'


def _faults(evidence: Evidence) -> str:
    rows = []
    for fault in evidence.faults:
        took = "–" if fault.recovered_at is None else f"{fault.recovered_at - fault.at:.1f} s"
        healed = "–" if fault.healed_at is None else f"{fault.healed_at:.1f} s"
        rows.append([f"{fault.at:.1f} s", _(fault.kind), _(fault.what), str(fault.step), healed, took])
    rows += [["–", "not injected", _(text), "", "", ""] for text in evidence.missed]
    return _table((">at", "fault", "what was done", ">step", ">healed at", ">recovered after"), rows)


def _oracles(judgements: Sequence[Judgement]) -> str:
    rows = [
        [
            f'<span class="verdict small {one.verdict.replace(" ", "-")}">{one.verdict}</span>',
            _(one.oracle),
            _(one.evidence),
        ]
        for one in judgements
    ]
    return _table(("verdict", "oracle", "evidence"), rows)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML; a name that begins with > is of a column of numbers."""
    right = [' class="number"' if name.startswith(">") else "" for name in names]
    head = "".join(f"<th{r}>{_(name.lstrip('>'))}</th>" for name, r in zip(names, right, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{r}>{cell}</td>' for cell, r in zip(row, right, strict=True))}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _(text: object) -> str:
    return html.escape(str(text))
