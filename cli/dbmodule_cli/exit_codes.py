"""The exit codes, in the one place from which every command's help and the documents take them."""

from __future__ import annotations

DONE = 0
FAILED = 1
USAGE = 2
DAMAGE = 3

EXIT_CODES = {
    DONE: "done",
    FAILED: "unexpected error; check found an error; demo found a difference",
    USAGE: "usage",
    DAMAGE: "corrupt pages in the source, or verify found damage",
    4: "refused to protect data",
    5: "repository unreachable or unusable",
    6: "server problem",
    7: "locked by another run",
    130: "interrupted (Ctrl-C)",
    143: "terminated (SIGTERM)",
}


def help_text() -> str:
    """The table as the last paragraph of a command's help; \\b keeps click from refilling it."""
    lines = [f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(["\b", "Exit codes:", *lines])
