"""Prints lines per file of the package and fails over 300 a file or 50 a function."""

import ast
import sys
from pathlib import Path

MAX_FILE, MAX_FUNCTION = 300, 50
ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    too_long = []
    total = 0
    for path in sorted(
        p for folder in ("convert", "bench", "fixtures", ".ci") for p in (ROOT / folder).rglob("*.py")
    ):
        text = path.read_text(encoding="utf-8")
        n_lines = len(text.splitlines())
        total += n_lines
        print(f"{n_lines:5}  {path.relative_to(ROOT)}")
        if n_lines > MAX_FILE:
            too_long.append(f"{path.relative_to(ROOT)} has {n_lines} lines, at most {MAX_FILE} are allowed")
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and node.end_lineno - node.lineno >= MAX_FUNCTION
            ):
                too_long.append(
                    f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has more than {MAX_FUNCTION} lines"
                )
    print(f"{total:5}  in all")
    print("\n".join(too_long), file=sys.stderr, end="\n" if too_long else "")
    return bool(too_long)


if __name__ == "__main__":
    sys.exit(main())
