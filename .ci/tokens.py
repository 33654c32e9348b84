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
    inside = 0  # how many f-strings are open: one is one token, as it is before Python 3.12
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        inside -= name == "FSTRING_END"
        line = token.start[0]
        documents = token.type == tokenize.STRING and line in docstrings
        free = token.type in FREE or documents or inside or name == "FSTRING_END"
        tokens += not free and line <= last
        inside += name == "FSTRING_START"
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
