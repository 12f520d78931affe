"""Which schemas have a document that ends: one that must hold itself without end has none.

Owns: the walk that finds the others, in time linear in their size.
Must not know: how keywords are checked or followed, pointers (`resolve` is given).
Invariant: a schema with a finite document is never called endless. What is not looked at (lengths, patterns,
numbers) counts as something that can be met.

Each schema is a gate of a circuit: it opens when enough of those it needs are open.

    required, allOf    all of what they need        anyOf, oneOf, types    one of them
    minProperties      as many of the properties    enum, const, scalars   nothing
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

CONTAINERS: Final = frozenset({"array", "object"})  # every other type has a value that holds nothing


def endless(schema: dict[str, Any], resolve: Callable[[str], Any]) -> frozenset[int]:
    """Return the `id` of each schema in `schema` no document of which is finite; `resolve` follows a `$ref`.

    Takes schemas as `schema_text` makes them: keywords hold what they must, references lead somewhere.
    """
    circuit = _Circuit(resolve)
    circuit.schema(schema)
    circuit.finish_building()
    return circuit.closed()


class _Circuit:
    def __init__(self, resolve: Callable[[str], Any]) -> None:
        self._resolve = resolve
        self._lacking: list[int] = []  # by gate: how many more of what it needs must open
        self._users: list[list[int]] = []
        self._made: dict[int, int] = {}  # id of a schema -> its gate
        self._unbuilt: list[tuple[int, dict[str, Any]]] = []

    def schema(self, schema: Any) -> int:
        """Return the gate of a schema; what it needs is added by `finish_building`."""
        if not isinstance(schema, dict):
            return self._gate([], 0 if schema else 1)
        gate = self._made.get(id(schema))
        if gate is None:
            gate = self._made[id(schema)] = self._gate([], 0)
            self._unbuilt.append((gate, schema))
        return gate

    def finish_building(self) -> None:
        while self._unbuilt:
            gate, schema = self._unbuilt.pop()
            for each in _held(schema):  # also what nobody needs: it may be endless
                self.schema(each)
            needed = self._needed(schema)
            self._lacking[gate] = len(needed)
            for each in needed:
                self._users[each].append(gate)

    def closed(self) -> frozenset[int]:
        """Return the schemas whose gates stay closed when all that can open has opened."""
        ready = [gate for gate, lacking in enumerate(self._lacking) if lacking == 0]
        opened = set(ready)
        while ready:
            for user in self._users[ready.pop()]:
                self._lacking[user] -= 1
                if self._lacking[user] == 0:
                    opened.add(user)
                    ready.append(user)
        return frozenset(schema for schema, gate in self._made.items() if gate not in opened)

    def _gate(self, inputs: list[int], least: int) -> int:
        """Return a new gate that opens with `least` of `inputs`."""
        self._lacking.append(least)
        self._users.append([])
        gate = len(self._lacking) - 1
        for each in inputs:
            self._users[each].append(gate)
        return gate

    def _needed(self, schema: dict[str, Any]) -> list[int]:
        if "enum" in schema or "const" in schema:
            return []
        needed = [self.schema(each) for each in schema.get("allOf", ())]
        if "$ref" in schema:
            needed.append(self.schema(self._resolve(schema["$ref"])))
        for keyword in schema.keys() & {"anyOf", "oneOf"}:
            needed.append(self._gate([self.schema(each) for each in schema[keyword]], 1))
        types = schema.get("type", "null")  # without a type, a scalar will do
        types = {types} if isinstance(types, str) else set(types)
        if types <= CONTAINERS:
            ways = {"array": self._array, "object": self._object}
            needed.append(self._gate([ways[each](schema) for each in sorted(types)], 1))
        return needed

    def _array(self, schema: dict[str, Any]) -> int:
        items, least = schema.get("items", True), schema.get("minItems", 0)
        first, rest = schema.get("prefixItems", []), items
        if isinstance(items, list):  # the drafts before 2020-12
            first, rest = items, schema.get("additionalItems", True)
        needed = [self.schema(each) for each in first[:least]]
        if least > len(first):
            needed.append(self.schema(rest))
        return self._gate(needed, len(needed))

    def _object(self, schema: dict[str, Any]) -> int:
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        needed = [self.schema(properties.get(name, others)) for name in set(schema.get("required", ()))]
        least = schema.get("minProperties", 0)
        if least:
            listed = self._gate([self.schema(each) for each in properties.values()], least)
            needed.append(self._gate([listed, self.schema(others)], 1))
        return self._gate(needed, len(needed))


def _held(schema: dict[str, Any]) -> Iterator[Any]:
    """Yield the schemas that values inside of a document are held to, and every definition."""
    for keyword in schema.keys() & {"properties", "$defs", "definitions"}:
        yield from schema[keyword].values()
    for keyword in schema.keys() & {"items", "additionalItems", "additionalProperties", "prefixItems"}:
        held = schema[keyword]
        yield from held if isinstance(held, list) else (held,)
