"""An answer as it arrives, taken apart into what the model says and the calls it makes.

Owns: the parser of every shape in tool_format, what is held back, what becomes of a call text that is none.
Must not know: dialects, call ids, grammars.
Invariant: whatever arrives, nothing is raised; the pieces an answer is cut into do not change what is found;
    time is linear. Text is held only while it may begin a call, and comes out as content if it does not.

    text     I will look. \\n <tool_call> {"name": "look", "arguments": {"at": 1}} </tool_call>
    content  I will look.                                              (space before a call goes with it)
    call                                  start "look"   {"at": 1}
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

from container.text.tool_format import Mark, Shape, ToolFormat
from container.text.tool_object import MAX_NAME_CHARS, SPACE, CallObject

CHUNK_CHARS: Final = 4096  # what was held is read again with what follows; this bounds the copies
MAX_HELD_SPACE: Final = 64  # characters of white space before a call that go with it


@dataclass(frozen=True, slots=True)
class Said:
    """Text of the answer that is no call."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class CallStarted:
    """The `index`-th call of the answer; comes once, before its arguments."""

    index: int
    name: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str = field(repr=False)


ToolDelta = Said | CallStarted | CallArguments


class ToolCallParser:
    """Reads one answer. `push` its text and its marks in order, then `finish`."""

    def __init__(self, form: ToolFormat, names: Collection[str], *, eager: bool, most: int) -> None:
        """Only calls of `names` count, and only the first `most`.

        `eager` gives arguments out as they come, for an answer held to a grammar. Otherwise a call is given
        out when it is whole, so that what turns out to be none can still be content.
        """
        self._form = form
        self._names = names
        self._eager = eager
        self._most = most
        self.calls = 0
        self._out: list[ToolDelta] = []
        self._held = ""  # content: white space and the beginning of a mark
        self._raw: list[str] = []  # of the call being read, while it may still become content
        self._name_text = ""
        self._skipped = 0  # characters between marks
        self._call = CallObject(names)
        self._started = False
        self._matched = 0  # characters of the end mark
        self._after_call = False  # nothing was said since the last call
        first = {Shape.BARE: self._start, Shape.PLAIN: self._start}
        self._state: Callable[[str, int], int] = first.get(form.shape, self._content)

    def push(self, text: str) -> list[ToolDelta]:
        """Return what `text` completes."""
        for start in range(0, len(text), CHUNK_CHARS):
            self._read(text[start : start + CHUNK_CHARS])
        return self._taken()

    def push_mark(self, mark: Mark, shown: str = "") -> list[ToolDelta]:
        """Take a control token that is one of the format's marks; `shown` is what a client sees of it."""
        form = self._form
        if mark == form.begin:
            if self._state in (self._close, self._list_next):
                self._replay(0)
            elif self._state not in (self._content, self._start):
                self._abandon()
            if self.calls < self._most:
                spaces, self._held = self._held, ""
                self._begin(spaces + shown)
            else:
                self._say(shown)
        elif mark == form.end and self._state == self._close:
            self._ended()
        elif mark == form.call_id and self._state == self._name:
            self._raw.append(shown)
            self._state = self._skip
        elif mark == form.arguments and self._state in (self._name, self._skip):
            self._name_given(shown)
        else:
            self._abandon()
            self._say(shown)
        return self._taken()

    def finish(self) -> list[ToolDelta]:
        """Return what is left at the end of the answer; a call that was cut off stays as it is."""
        left = "".join(self._raw) + self._held
        between = self._state in (self._close, self._list_next)
        # Held to a grammar, only calls follow a call: what is left is the beginning of one that was cut off.
        if not (self._after_call and (self._eager or between or not left.strip(SPACE))):
            self._abandon()
        return self._taken()

    def _taken(self) -> list[ToolDelta]:
        out, self._out = self._out, []
        return out

    def _read(self, text: str) -> None:
        place = 0
        while place < len(text):
            place = self._state(text, place)

    # Content

    def _start(self, text: str, place: int) -> int:
        """The answer's first characters, where these shapes have their calls."""
        if text[place] in SPACE and len(self._held) < MAX_HELD_SPACE:
            self._held += text[place]
            return place + 1
        if text[place] != ("{" if self._form.shape is Shape.BARE else "["):
            self._state = self._content
            return place
        self._begin(self._held)
        self._held = ""
        return place

    def _content(self, text: str, place: int) -> int:
        begin = self._form.begin
        mark = begin.text if begin is not None and begin.token is None else ""
        if self._held:
            held, self._held = self._held, ""
            self._read(held + text[place:])
            return len(text)
        room = self.calls < self._most
        found = text.find(mark, place) if mark and room else -1
        if found < 0:
            stop = len(text) - (_begun(text[place:], mark) if room else 0)
            self._keep(text, place, stop)
            return len(text)
        self._keep(text, place, found)
        spaces, self._held = self._held[: len(self._held) - (len(text) - found)], ""
        self._begin(spaces + mark)
        return found + len(mark)

    def _keep(self, text: str, place: int, stop: int) -> None:
        """Say `text` from `place` to `stop`, but for the space at its end, held with the rest."""
        spoken = text[place:stop]
        start = place + max(len(spoken.rstrip(SPACE)), len(spoken) - MAX_HELD_SPACE)
        self._say(text[place:start])
        self._held = text[start:]

    def _say(self, text: str) -> None:
        text = self._held + text
        self._held = ""
        if text:
            self._after_call = False
            self._out.append(Said(text))

    # Calls

    def _begin(self, raw: str) -> None:
        self._raw = [raw] if raw else []
        self._name_text = ""
        self._skipped = 0
        self._call = CallObject(self._names)
        self._started = False
        states = {Shape.LISTED: self._list_open, Shape.PLAIN: self._list_open, Shape.NAMED: self._name}
        self._state = states.get(self._form.shape, self._object)

    def _abandon(self) -> None:
        """Give up on what is being read: it becomes content, unless parts of it are out already."""
        raw, self._raw = "".join(self._raw), []
        self._state = self._content
        self._say(raw)

    def _list_open(self, text: str, place: int) -> int:
        if text[place] == "[":
            self._state = self._object
        elif text[place] not in SPACE:
            self._abandon()
            return place
        self._raw.append(text[place])
        return place + 1

    def _object(self, text: str, place: int) -> int:
        end = self._call.feed(text, place)
        if not self._started:
            self._raw.append(text[place:end])
        if self._call.failed:
            self._abandon()
        elif self._call.done or self._eager:
            self._give()
        if self._call.done:
            self._call_ended()
        return end

    def _give(self) -> None:
        """Put out what is known of the call, its name first."""
        call = self._call
        if call.name is None or not call.fragments:
            return
        if not self._started:
            self._started = True
            self._raw = []
            self._out.append(CallStarted(self.calls, call.name))
            self.calls += 1
        self._out.append(CallArguments(self.calls - 1, "".join(call.fragments)))
        call.fragments.clear()

    def _call_ended(self) -> None:
        self._after_call = True
        self._matched = 0
        shape = self._form.shape
        if shape is Shape.TAGGED:
            self._state = self._close
        elif shape in (Shape.LISTED, Shape.PLAIN):
            self._state = self._list_next
        else:
            self._ended()

    def _ended(self) -> None:
        self._raw = []
        self._state = self._content

    def _close(self, text: str, place: int) -> int:
        """After a call or a list, before its end mark; anything else is content."""
        end = self._form.end
        mark = end.text if end is not None and end.token is None else ""
        if self._matched < len(mark) and text[place] == mark[self._matched]:
            self._matched += 1
        elif self._matched or text[place] not in SPACE:
            return self._replay(place)
        self._raw.append(text[place])
        if mark and self._matched == len(mark):
            self._ended()
        return place + 1

    def _list_next(self, text: str, place: int) -> int:
        char = text[place]
        if char == "]":
            self._raw = []
            self._matched = 0
            self._state = self._close if self._form.end is not None else self._content
        elif char == "," and self.calls < self._most:
            self._begin("".join([*self._raw, char]))
            self._state = self._object
        elif char in SPACE:
            self._raw.append(char)
        else:
            return self._replay(place)
        return place + 1

    def _replay(self, place: int) -> int:
        """Read what was kept since the last call as content."""
        raw, self._raw = "".join(self._raw), []
        self._state = self._content
        self._read(raw)
        return place

    def _name(self, text: str, place: int) -> int:
        self._name_text += text[place:]
        return self._skip(text, place)

    def _skip(self, text: str, place: int) -> int:
        """Keep what stands between the marks of a named call, for the case that it is none."""
        self._raw.append(text[place:])
        self._skipped += len(text) - place
        if self._skipped > MAX_NAME_CHARS:
            self._abandon()
        return len(text)

    def _name_given(self, shown: str) -> None:
        name = self._name_text.strip(SPACE)
        if name in self._names:
            self._raw.append(shown)
            self._call.arguments_of(name)
            self._state = self._object
        else:
            self._abandon()
            self._say(shown)


def _begun(text: str, mark: str) -> int:
    """Return how many characters at the end of `text` may begin `mark`."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
