"""The child process that renders chat templates, and nothing else.

Owns: the Jinja environment (set up as transformers sets it up), the tracing of the template's own text, the
    limits the process puts on itself.
Must not know: tokenizers, models, other requests. It has no environment, no open file but its socket.
Invariant: what it answers is text plus the ranges the template itself wrote, or one of three words; never an
    exception's message.

    parent -> {"templates": {name: source}, "tokens": {name: text}}     once
    parent -> {"template", "messages", "tools", "add_generation_prompt", "arguments"}
    child  -> {"text", "spans"} | {"error": "failed" | "memory" | "refused"}
"""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from container.text import frames
from container.text.provenance import Span, Traced, concat, trusted

ADDRESS_SPACE_BYTES: Final = 256 * 1024 * 1024  # templates can ask for any amount; this is all there is
CPU_S: Final = 1.0  # for one render; the kernel counts whole seconds, so up to 2 pass
OPEN_FILES: Final = 16  # modules imported late are opened for a moment
# Roles are the one part of a message that may stand inside a control token (`'<|' + role + '|>'`).
ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks training targets; when serving it is its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it this way)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Fields(Namespace):
    """Jinja's namespace without underscore names, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `namespace(self=...)` is legal
        fields = dict(*args[1:], **kwargs)
        for name in fields:
            _Fields._check(name)
        Namespace.__init__(args[0], fields)

    def __setitem__(self, name: str, value: Any) -> None:
        _Fields._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError("underscore name")


def _raise_exception(message: object) -> None:
    raise jinja2.exceptions.TemplateError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # noqa: DTZ005  (local time, as transformers)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    separator = d if isinstance(d, Traced) else Traced(d)
    return separator.join([str(item) for item in value])


def _printable(value: object) -> object:
    """Refuse to print functions: their text holds an address of this process."""
    if callable(value) and not isinstance(value, jinja2.Undefined):
        raise jinja2.exceptions.SecurityError("callable in the output")
    return value


def _tilde(*values: object) -> str:
    return concat([str(value) for value in values])


class _Tracing(NodeTransformer):
    """Replaces every string the template's author wrote by the same string, traced.

    Left alone are places that cannot reach the output: comparisons, tests, subscripts.
    """

    def __init__(self, environment: ImmutableSandboxedEnvironment) -> None:
        self._environment = environment
        self._names: dict[str, str] = {}

    def _literal(self, text: str, node: nodes.Node) -> nodes.Node:
        if not text:
            return node
        name = self._names.setdefault(text, f"traced_{len(self._names)}")
        setattr(self._environment, name, trusted(text))
        return nodes.EnvironmentAttribute(name).set_lineno(node.lineno)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return self._literal(node.data, node)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        return self._literal(node.value, node) if isinstance(node.value, str) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node.node = self.visit(node.node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        tilde = nodes.EnvironmentAttribute("traced_tilde")
        return nodes.Call(tilde, node.nodes, [], None, None).set_lineno(node.lineno)


class Templates:
    """The vendor's templates, compiled; renders conversations into text with provenance."""

    def __init__(self, sources: dict[str, str], tokens: dict[str, str]) -> None:
        """Raises jinja2.TemplateError on a template that does not compile."""
        self._tokens = {name: trusted(text) for name, text in tokens.items()}
        self._templates = {name: _compile(source) for name, source in sources.items()}

    def render(self, request: dict[str, Any]) -> tuple[str, tuple[Span, ...]]:
        """Return the text and its trusted ranges; raises whatever the template raises."""
        for message in request["messages"]:
            if message.get("role") in ROLES:
                message["role"] = trusted(message["role"])
        text = self._templates[request["template"]].render(
            **{"documents": None, **request["arguments"]},
            **self._tokens,
            messages=request["messages"],
            tools=request["tools"],
            add_generation_prompt=request["add_generation_prompt"],
        )
        return text, text.spans if isinstance(text, Traced) else ()


def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
        autoescape=False,  # the output is a prompt, not a page
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _tojson
    environment.filters["join"] = _join
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _new_dict
    environment.globals["namespace"] = _Fields
    environment.concat = concat  # type: ignore[method-assign]  # a class attribute meant to be replaced
    environment.traced_tilde = _tilde  # type: ignore[attr-defined]
    tree = environment.parse(source)
    return environment.from_string(_Tracing(environment).visit(tree))


def answer(templates: Templates, request: dict[str, Any]) -> dict[str, Any]:
    """Return the reply frame for one request; every failure is one of the three words."""
    try:
        text, spans = templates.render(request)
        text.encode()
    except MemoryError:
        return {"error": "memory"}
    except jinja2.exceptions.SecurityError:
        return {"error": "refused"}
    except Exception:  # noqa: BLE001  (a template can raise anything; none of it may leave the process)
        return {"error": "failed"}
    return {"text": text, "spans": spans}


def _restrict() -> None:
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))


def _allow_cpu() -> None:
    """Give the process CPU_S from now on; the kernel ends it with SIGXCPU after that."""
    soft_s = int(time.process_time() + CPU_S) + 1
    hard_s = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if hard_s != resource.RLIM_INFINITY:
        soft_s = min(soft_s, hard_s)
    resource.setrlimit(resource.RLIMIT_CPU, (soft_s, hard_s))


def _send(channel: socket.socket, reply: dict[str, Any]) -> None:
    payload = json.dumps(reply, ensure_ascii=False).encode()
    frames.send(channel, payload if len(payload) <= frames.MAX_FRAME_BYTES else b'{"error": "failed"}')


def main() -> None:
    """Serve the socket on descriptor 0 until the parent closes it."""
    _restrict()
    channel = socket.socket(fileno=0)
    channel.setblocking(True)  # a parent patched by gevent makes both ends non-blocking
    setup = frames.receive(channel)
    if setup is None:
        return
    _allow_cpu()
    try:
        templates = Templates(setup["templates"], setup["tokens"])
    except Exception:  # noqa: BLE001  (whatever is wrong with the template, the word is the same)
        _send(channel, {"error": "failed"})
        return
    _send(channel, {"text": "", "spans": ()})
    while (request := frames.receive(channel)) is not None:
        _allow_cpu()
        reply = answer(templates, request)
        _send(channel, reply)
        if reply.get("error") == "memory":
            return  # what is left of the heap is not worth keeping; the parent starts another


if __name__ == "__main__":
    main()
