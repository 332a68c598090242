"""The notation in which the commands' help says what `--json` prints (docs/commands.md), and what breaks it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_TOKEN = re.compile(r'\s*("[^"]*"|\*\*|[A-Za-z]+|[{}\[\],:|=])')
_PLAIN: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "null": (type(None),),
}


class Notation:
    """One document: `faults(value)` says where a value is not what the text says."""

    def __init__(self, text: str) -> None:
        self._tokens = _TOKEN.findall(re.sub(r"#.*", "", text))
        self._document = self._either()
        self._words: dict[str, Any] = {}
        while self._tokens:
            name, _ = self._take(), self._take("=")
            self._words[name] = self._either()

    def faults(self, value: object) -> list[str]:
        return list(self._faults(self._document, value, "$"))

    # What it says, as nested tuples: ("word", w), ("array", of), ("any", of), ("object", members), ("either", kinds)

    def _take(self, expected: str = "") -> str:
        token: str = self._tokens.pop(0)
        assert not expected or token == expected, f"{expected} expected, not {token} {self._tokens}"
        return token

    def _either(self) -> Any:
        kinds = [self._one()]
        while self._tokens[:1] == ["|"]:
            self._take("|")
            kinds.append(self._one())
        return ("either", kinds)

    def _one(self) -> Any:
        token = self._take()
        if token == "[":
            of = self._either()
            self._take("]")
            return ("array", of)
        return self._object() if token == "{" else ("word", token)

    def _object(self) -> Any:
        if self._tokens[0] == "str":
            self._take("str"), self._take(":")
            of = self._either()
            self._take("}")
            return ("any", of)
        members: dict[str, Any] = {}
        while True:
            name = self._take()
            if name == "**":
                members[f"**{self._take()}"] = None
            else:
                self._take(":")
                members[json.loads(name)] = self._either()
            if self._take() == "}":
                return ("object", members)

    # Whether a value is that

    def _faults(self, kind: Any, value: object, where: str) -> Iterator[str]:
        match kind:
            case "either", kinds:
                found = [list(self._faults(each, value, where)) for each in kinds]
                if all(found):
                    yield from (
                        found[0] if len(found) == 1 else [f"{where}: {value!r:.60} is none of {len(kinds)} kinds"]
                    )
            case "word", word if word in self._words:
                yield from self._faults(self._words[word], value, where)
            case "word", word:
                plain = word.startswith('"') or word in _PLAIN
                same = value == json.loads(word) if word.startswith('"') else self._is_plain(word, value)
                if not (plain and same):
                    yield f"{where}: {value!r:.60} is not {word}"
            case "array", of if isinstance(value, list):
                for index, each in enumerate(value):
                    yield from self._faults(of, each, f"{where}[{index}]")
            case "any", of if isinstance(value, dict):
                for name, each in value.items():
                    yield from self._faults(of, each, f"{where}.{name}")
            case "object", members if isinstance(value, dict):
                yield from self._members(dict(members), value, where)
            case _:
                yield f"{where}: {value!r:.60} is no {kind[0]}"

    def _members(self, members: dict[str, Any], value: dict[str, object], where: str) -> Iterator[str]:
        for name in [name for name in members if name.startswith("**")]:
            ((_, inner),) = self._words[name.removeprefix("**")][1]
            del members[name]
            members |= inner
        if members.keys() != value.keys():
            yield f"{where}: these members are on one side only: {sorted(members.keys() ^ value.keys())}"
        for name in members.keys() & value.keys():
            yield from self._faults(members[name], value[name], f"{where}.{name}")

    @staticmethod
    def _is_plain(word: str, value: object) -> bool:
        return isinstance(value, _PLAIN.get(word, ())) and (word == "bool" or not isinstance(value, bool))
