"""RESULTS.md: one section for each benchmark, between markers of its own."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"


def write_section(name: str, section: str) -> None:
    """Put `section` between the markers of `name`, or at the end of the file if it has none."""
    text = RESULTS.read_text() if RESULTS.exists() else "# What the benchmarks measured\n"
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    body = f"{begin}\n{section.strip()}\n{end}"
    before, found, rest = text.partition(begin)
    if not found:
        RESULTS.write_text(f"{text.rstrip()}\n\n{body}\n")
        return
    _, closed, after = rest.partition(end)
    if not closed:
        raise ValueError(f"found {begin} without {end}; restore the marker by hand")
    RESULTS.write_text(before + body + after)
