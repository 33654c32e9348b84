"""Counts Python tokens without comments, docstrings, blank lines and indentation; fails above a
ceiling. Usage: tokens.py FILE:CEILING ...; FILE:NAME:CEILING counts to the end of class NAME."""

import ast
import io
import sys
import tokenize

FREE = {
    tokenize.NL,
    tokenize.COMMENT,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def count(path, until=None):
    """The tokens of a file, or of its part down to the end of a class."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    docstrings = set()
    last = len(text.splitlines())
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            docstrings.add(node.body[0].lineno)
        if isinstance(node, ast.ClassDef) and node.name == until:
            last = node.end_lineno
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        documents = token.type == tokenize.STRING and line in docstrings
        tokens += token.type not in FREE and not documents and line <= last
    return tokens


def main():
    """Prints each count beside its ceiling; exit code 1 where one is above."""
    failed = False
    for argument in sys.argv[1:]:
        path, *until, ceiling = argument.split(":")
        tokens = count(path, *until)
        print(f"{argument}: {tokens:,} tokens")
        failed |= tokens > int(ceiling)
    sys.exit(failed)


if __name__ == "__main__":
    main()
