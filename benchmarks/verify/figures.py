"""Finds in a Markdown text the figures that look measured, and the tables that are written from stored runs."""

from __future__ import annotations

import re
from typing import NamedTuple

UNITS = "ns|µs|ms|s|seconds?|minutes?|hours?|KiB|MiB|GiB|kB|MB|GB|GFLOP|GFLOP/s|GB/s"
NUMBER = r"\d*\.?\d+"
# A figure looks measured by what stands beside the number.
MEASURED = re.compile(
    rf"""
    [+-]?{NUMBER}\s?±\s?{NUMBER}            # 2.7 ± 1.0
    | [+-]?{NUMBER}\s?%                     # 75.7 %
    | [+-]?{NUMBER}\s(?:points|times)\b     # 2.7 points
    | \b{NUMBER}\s(?:{UNITS})(?![\w/])      # 0.28 ms
    | \bx\s{NUMBER}                         # x 1.003
    | \bp\s[=<]\s{NUMBER}                   # p = 0.005
    """,
    re.VERBOSE,
)
DECIMAL = re.compile(r"(?<![\w.])[+-]?\d*\.\d+(?![\w.])")
IN_A_ROW = re.compile(f"{MEASURED.pattern}|{DECIMAL.pattern}", re.VERBOSE)
ROW = re.compile(r"^\|.*$", re.MULTILINE)
# What is no text for readers, or is code; the confidence of intervals; versions.
HIDDEN = re.compile(
    r"^```.*?^```|`[^`\n]*`|<!--.*?-->|\]\([^)\s]*\)"
    r"|(?<![\d.])95\s%(?=\s(?:bootstrap\s)?(?:confidence|interval))"
    r"|\b(?:torch|PyTorch)\s[\d.]+",
    re.DOTALL | re.MULTILINE,
)
TABLE = re.compile(r"^<!-- stored: (?P<name>\w+) -->\n(?P<rows>.*?)^<!-- end -->$", re.DOTALL | re.MULTILINE)


class Figure(NamedTuple):
    """Holds a figure and where it stands."""

    text: str
    line: int


def tables(markdown: str) -> dict[str, str]:
    """Return the tables between the marks `<!-- stored: NAME -->` and `<!-- end -->`, by name."""
    return {match["name"]: match["rows"] for match in TABLE.finditer(markdown)}


def with_tables(markdown: str, written: dict[str, str]) -> str:
    """Return the text with these tables between their marks."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- stored: {match['name']} -->\n{written[match['name']]}<!-- end -->"

    return TABLE.sub(table, markdown)


def uncovered(markdown: str, covered: list[str]) -> list[Figure]:
    """Return the figures that stand in none of the sentences `covered`, nor in a stored table."""
    text = _blanked(TABLE, markdown)
    for sentence in covered:
        text = _blanked(_anywhere(sentence), text)
    text = _blanked(HIDDEN, text)
    # A figure and its unit may stand on two lines, but not on two rows of a table.
    matches = list(MEASURED.finditer(_blanked(ROW, text)))
    for row in ROW.finditer(text):
        matches += IN_A_ROW.finditer(text, row.start(), row.end())
    found = []
    for match in sorted(matches, key=lambda match: match.start()):
        found.append(Figure(" ".join(match[0].split()), text.count("\n", 0, match.start()) + 1))
    return found


def contains(markdown: str, sentence: str) -> bool:
    """Tell whether a text has a sentence, however its lines are broken."""
    return bool(_anywhere(sentence).search(markdown))


def _anywhere(sentence: str) -> re.Pattern[str]:
    words = [re.escape(word) for word in sentence.split()]
    # A longer number is another number.
    return re.compile(r"(?<![\d.])" + r"\s+".join(words) + r"(?!\d|\.\d)")


def _blanked(pattern: re.Pattern[str], text: str) -> str:
    """Return the text without what the pattern finds, every line in its place."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
