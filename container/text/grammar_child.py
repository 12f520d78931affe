"""The child process that builds grammars: it holds the tokenizer, and forks once for every request.

Owns: compiling, the first steps of following, judging a finished text, the limits of each fork.
Must not know: other requests, HTTP, the engine. It has no environment, no open file but its sockets.
Invariant: what it answers is one of GrammarReason's words or none; never a library's message, which may
    show the grammar. A fork cannot outlive its alarm, whatever native code it is in.

    parent --(a socket's descriptor)--> this process --fork--> answers one frame on that socket and ends
    {"kind", "text", "limit_s"}            -> {} | {"reason", "keyword"?}
    {"kind", "text", "limit_s", "answer"}  -> {"holds": bool}

A fork here is cheap and clean: one thread, no gevent. The tokenizer (0.5 s to build, 60 to 400 MB) is shared
with every fork, so that a fork that dies costs nobody else anything.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import socket
import time
from typing import Any, Final

from jsonschema import validators
from jsonschema.exceptions import ValidationError
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from container.text import frames
from container.text.grammar_errors import GrammarError, GrammarReason

REQUEST_S: Final = 5.0  # wall clock until a fork has its request; the request says its own limit
MEMORY_BYTES: Final = 100 * 1024 * 1024  # of address space, above what the tokenizer takes
SETUP_BYTES: Final = 8 * 1024 * 1024 * 1024  # of address space while the tokenizer is built
OPEN_FILES: Final = 24
STEPS: Final = 24  # tokens followed in a check: many grammars show their cost only after a first letter
WALK_CPU_S: Final = 0.3
STEP_CPU_S: Final = 0.15  # one step of the engine must stay far below a second, whatever it waits for
# Measured with 1.9.1: patterns with `.*` fail after 390 tokens consumed without a mask, never after 64.
STRETCH: Final = 16
# The engine's own (container.model.grammar.PARSER_LIMITS, a test compares them): what passes here is followed
# there. Error texts of the library quote the grammar, so it is told to keep them short.
LIMITS: Final[dict[str, Any]] = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 10_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
# What the library says, by the part of its message that is a fixed phrase.
PHRASES: Final = (
    ("Unknown format", GrammarReason.UNSUPPORTED_KEYWORD, "format"),
    ("oneOf constraints", GrammarReason.UNSUPPORTED_KEYWORD, "oneOf"),
    ("Unimplemented keys", GrammarReason.UNSUPPORTED_KEYWORD, None),
    ("Unsatisfiable", GrammarReason.UNSATISFIABLE, None),
    ("look-around", GrammarReason.REGEX_FEATURE, None),
    ("backreferences", GrammarReason.REGEX_FEATURE, None),
    ("regex", GrammarReason.INVALID_REGEX, None),
    ("too big", GrammarReason.TOO_COMPLEX, None),
    ("too large", GrammarReason.TOO_COMPLEX, None),
    ("recursion limit", GrammarReason.TOO_COMPLEX, None),
)
OF_PATTERNS: Final = frozenset({GrammarReason.REGEX_FEATURE, GrammarReason.INVALID_REGEX})


class Builder:
    """Builds and follows grammars over one tokenizer."""

    def __init__(self, tokenizer: str, end_ids: list[int]) -> None:
        """Raises whatever the library raises on a tokenizer it cannot read."""
        self._tokenizer = LLTokenizer(tokenizer, eos_token=end_ids or None)
        self._limits = LLParserLimits(**LIMITS)
        self.check("regex", "a")  # what the library builds once is built before the first fork

    def check(self, kind: str, text: str) -> None:
        """Raise GrammarError when the grammar cannot be built or is slow to follow."""
        grammar = _grammar(kind, text)
        failed, messages = LLMatcher.validate_grammar_with_warnings(
            grammar, self._tokenizer, limits=self._limits
        )
        if failed:
            raise _refusal(kind, messages[0] if messages else "")
        matcher = self._matcher(grammar)
        if matcher.is_error():
            raise _refusal(kind, matcher.get_error())
        _walk(matcher)

    def holds(self, kind: str, text: str, answer: str) -> bool:
        """Return True when `answer` is whole and in the language of the grammar."""
        matcher = self._matcher(_grammar(kind, text))
        tokens = self._tokenizer.greedy_tokenize(answer)
        for at in range(0, len(tokens), STRETCH):
            matcher.compute_bitmask()  # without one now and then, the library fails on a right token
            if not matcher.consume_tokens(tokens[at : at + STRETCH]):
                return False
        if not matcher.is_accepting():
            return False
        return kind != "json_schema" or _follows_schema(json.loads(text), answer)

    def _matcher(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, grammar, limits=self._limits, log_level=0)


def _grammar(kind: str, text: str) -> str:
    if kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(text)
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    return LLMatcher.grammar_from_lark(text)


def _refusal(kind: str, message: str) -> GrammarError:
    for phrase, reason, keyword in PHRASES:
        if phrase in message:
            pattern = kind == "json_schema" and reason in OF_PATTERNS
            return GrammarError(reason, "pattern" if pattern else keyword)
    return GrammarError(GrammarReason.NOT_COMPILED)


def _walk(matcher: LLMatcher) -> None:
    """Follow the grammar for some random steps; raises GrammarError where that fails or is slow."""
    draw = random.Random(0)
    started_s = time.process_time()
    for step in range(STEPS):
        step_s = time.process_time()
        mask = matcher.compute_bitmask()
        now_s = time.process_time()
        if matcher.is_error():
            nothing = step == 0 and "NoExtension" in matcher.get_error()
            raise GrammarError(GrammarReason.UNSATISFIABLE if nothing else GrammarReason.TOO_COMPLEX)
        if now_s - step_s > STEP_CPU_S:
            raise GrammarError(GrammarReason.TOO_COMPLEX)
        if matcher.is_stopped() or now_s - started_s > WALK_CPU_S:
            return
        token = _drawn(mask, draw)
        if token is None or not matcher.consume_token(token):
            return


def _drawn(mask: bytes, draw: random.Random) -> int | None:
    """Return one of the tokens `mask` allows, None when it allows none."""
    start = draw.randrange(len(mask))
    for offset in range(len(mask)):
        at = (start + offset) % len(mask)
        bits = [bit for bit in range(8) if mask[at] >> bit & 1]
        if bits:
            return at * 8 + draw.choice(bits)
    return None


def _follows_schema(schema: dict[str, Any], answer: str) -> bool:
    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    # Patterns were judged with the rest of the grammar, by automata; Python's `re` can take for ever.
    judge = validators.extend(kind, {"pattern": lambda *_: None})
    try:
        judge(schema).validate(json.loads(answer))
    except (ValidationError, ValueError):
        return False
    return True


def answer(builder: Builder, request: dict[str, Any]) -> dict[str, Any]:
    """Return the reply frame for one request."""
    try:
        if "answer" in request:
            return {"holds": builder.holds(request["kind"], request["text"], request["answer"])}
        builder.check(request["kind"], request["text"])
    except GrammarError as error:
        return {"reason": error.reason.value, "keyword": error.keyword}
    except (MemoryError, RecursionError):
        return {"reason": GrammarReason.RESOURCES.value}
    except BaseException:  # noqa: BLE001  (a panic of native code is no Exception; none of it may leave here)
        return {"reason": GrammarReason.NOT_COMPILED.value}
    return {}


def _serve(builder: Builder, fd: int) -> None:
    """Answer the one request of a fork."""
    signal.setitimer(signal.ITIMER_REAL, REQUEST_S)
    channel = socket.socket(fileno=fd)
    channel.setblocking(True)
    request = frames.receive(channel)
    if request is None:
        return
    # The alarm's default action ends the process, whatever native code it is in.
    signal.setitimer(signal.ITIMER_REAL, request["limit_s"])
    pages = int(_read("/proc/self/statm").split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    frames.send(channel, json.dumps(answer(builder, request)).encode())


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:  # noqa: PTH123  (pathlib is not needed for this)
        return file.read()


def _restrict() -> None:
    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    resource.setrlimit(resource.RLIMIT_AS, (SETUP_BYTES, SETUP_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))


def _tokenizer_text(fd: int) -> str:
    with os.fdopen(fd, "rb") as file:
        return os.pread(fd, os.fstat(file.fileno()).st_size, 0).decode()


def main() -> None:
    """Serve the socket on descriptor 0 until the parent closes it; descriptor 3 is the tokenizer's file."""
    _restrict()
    channel = socket.socket(fileno=0)
    channel.setblocking(True)  # a parent patched by gevent makes both ends non-blocking
    setup = frames.receive(channel)
    if setup is None:
        return
    try:
        builder = Builder(_tokenizer_text(3), setup["end_ids"])
    except BaseException:  # noqa: BLE001  (whatever is wrong with the tokenizer, the word is the same)
        frames.send(channel, json.dumps({"reason": GrammarReason.UNAVAILABLE.value}).encode())
        return
    gc.collect()
    gc.freeze()  # a fork's collector would otherwise write to, and so copy, every shared page
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks are reaped by the kernel
    frames.send(channel, b"{}")
    while True:
        data, fds, _, _ = socket.recv_fds(channel, 1, 1)
        if not data:
            return
        if fds and os.fork() == 0:
            try:
                channel.close()
                _serve(builder, fds[0])
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)


if __name__ == "__main__":
    main()
