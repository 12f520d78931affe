"""Writes every vector into `vectors/`: python -m tests.model_package.make_vectors.

Owns: the folder. Must not know: what the vectors say. Invariant: the same bytes every time, on every machine.
"""

from __future__ import annotations

from pathlib import Path

from tests.model_package import recipes, recipes_sealed
from tests.model_package.vector_file import Vector, dump

FOLDER = Path(__file__).parent / "vectors"
SUFFIX = ".vector"


def all_vectors() -> dict[str, Vector]:
    """Return name -> vector; no name twice."""
    made: dict[str, Vector] = {}
    for name, vector in [*recipes.recipes(), *recipes_sealed.recipes()]:
        assert name not in made, name
        made[name] = vector
    return made


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    made = all_vectors()
    for path in FOLDER.glob(f"*{SUFFIX}"):
        if path.stem not in made:
            path.unlink()
    for name, vector in made.items():
        (FOLDER / f"{name}{SUFFIX}").write_bytes(dump(vector))


if __name__ == "__main__":
    main()
