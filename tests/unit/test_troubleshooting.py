"""docs/troubleshooting.md quotes messages that the code really gives."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPO = Path(__file__).parents[2]
# What a run fills in; the beginning that ``WaitExpired`` gives to the name of any wait; keys of the configuration.
PLACEHOLDER = re.compile(r"\.\.\.|waited N s for(?: the)?|\b[A-Z][A-Z_]*\b|cluster\.\w+")


def text_of(node: ast.AST) -> str:
    """The text of a string expression; what is filled in when it runs is left out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return ""


def test_every_quoted_message_is_one_of_the_code() -> None:
    sources = [*(REPO / "agpo_megatron").rglob("*.py")]
    texts = {text_of(node) for path in sources for node in ast.walk(ast.parse(path.read_text()))}
    said = " ".join(" ".join(text.split()) for text in texts)
    quoted = [
        message
        for line in (REPO / "docs" / "troubleshooting.md").read_text().splitlines()
        if line.startswith("| ")
        for message in re.findall(r"`([^`]+)`", line.split("|")[1])
        if len(message.split()) > 2
    ]
    assert len(quoted) > 30
    unknown = []
    for message in quoted:
        parts = [part.strip(" ,:;()") for part in PLACEHOLDER.split(message)]
        known = [part in said for part in parts if len(part) > 3]
        if not known or not all(known):
            unknown.append(message)
    assert unknown == []
