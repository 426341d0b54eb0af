"""The rules of the house that a linter does not know. import-linter (pyproject.toml) holds the ones about imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPO = Path(__file__).parents[2]
PACKAGE = REPO / "agpo_megatron"
SOURCES = sorted(PACKAGE.rglob("*.py"))
EVERYTHING = sorted([*SOURCES, *(REPO / "tools").rglob("*.py"), *(REPO / "tests").rglob("*.py")])
BAGS = {"utils", "util", "helpers", "helper", "misc", "common"}
NO_OPENING = {"What", "Whether", "Of", "How", "Where", "As", "Those"}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(REPO)}:{line}"


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 30
    assert len(EVERYTHING) > len(SOURCES)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those after an assignment included."""
    for node in ast.walk(tree_of(path)):
        body = getattr(node, "body", [])
        for statement in body if isinstance(body, list) else []:
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield statement.lineno, text


def public_types(path: Path) -> Iterator[str]:
    """Names of the public classes and type aliases (CamelCase) of a module."""
    for node in tree_of(path).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [getattr(node, "name", ""), *(t.id for t in targets if isinstance(t, ast.Name))]
        yield from (n for n in names if re.fullmatch(r"[A-Z]\w*[a-z]\w*", str(n)))


def test_a_file_has_at_most_500_lines() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in EVERYTHING}
    assert [place(path, n) for path, n in lengths.items() if n > 500] == []


def test_a_function_has_at_most_80_lines() -> None:
    assert [
        f"{place(path, f.lineno)} {f.name}"
        for path in EVERYTHING
        for f in functions(path)
        if (f.end_lineno or f.lineno) - f.lineno + 1 > 80
    ] == []


def test_no_module_is_a_bag() -> None:
    assert [
        str(path) for path in SOURCES if BAGS & {path.stem, *path.relative_to(PACKAGE).parts}
    ] == []


def test_only_the_command_line_prints() -> None:
    assert [
        place(path, node.lineno)
        for path in SOURCES
        for node in ast.walk(tree_of(path))
        if path != PACKAGE / "cli.py"
        and isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ] == []


def test_nothing_is_left_for_later() -> None:
    later = re.compile(r"\b(TODO|FIXME|XXX)\b")
    assert [
        place(path, number)
        for path in SOURCES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if later.search(line)
    ] == []


def test_a_module_says_what_it_is() -> None:
    assert [
        str(path) for path in SOURCES if tree_of(path).body and not ast.get_docstring(tree_of(path))
    ] == []


def test_a_docstring_begins_with_a_verb_or_a_noun() -> None:
    assert [
        f"{place(path, line)} {text[:40]}"
        for path in SOURCES
        for line, text in docstrings(path)
        if text.split()[0].rstrip(",.:;") in NO_OPENING
    ] == []


def test_no_two_public_types_share_a_name() -> None:
    places: dict[str, list[Path]] = {}
    for path in SOURCES:
        for name in public_types(path):
            places.setdefault(name, []).append(path.relative_to(REPO))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_functions_are_annotated() -> None:
    def annotated(f: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
        named = [a for a in arguments if a.arg not in ("self", "cls")]
        return f.returns is not None and all(a.annotation is not None for a in named)

    assert [
        f"{place(path, f.lineno)} {f.name}"
        for path in SOURCES
        for f in functions(path)
        if not annotated(f)
    ] == []
