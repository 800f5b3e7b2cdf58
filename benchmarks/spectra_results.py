"""Tells what stored runs on spectra say: benchmarks/spectra.py makes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.common.records import RunRecord, read_records
from benchmarks.common.statistics import interval, p_text
from benchmarks.paper.summary import corrected_by_name
from benchmarks.spectra import ARMS, CHOSEN_RATE, EPOCHS, FIRST_SEED, PLS, TUNING_SEEDS, VANILLA, settings_of

DIGITS = 3
FINAL_SEEDS = range(FIRST_SEED, FIRST_SEED + 8)
HEAD = ["arm", "seeds", "test error", "from vanilla", "p", "seconds of training"]


def read(path: Path, part: str) -> dict[str, list[RunRecord]]:
    """Return the planned runs that were tested on a part of the spectra, by arm and in the order of seeds."""
    found: dict[str, list[RunRecord]] = {}
    records = sorted(read_records(path).values(), key=lambda record: record.seed)
    for record in records:
        if record.settings["part"] == part and _is_planned(record):
            found.setdefault(record.arm, []).append(record)
    return found


def _is_planned(record: RunRecord) -> bool:
    """Return whether a run has the plan's settings and seeds; final runs have the chosen rate."""
    settings = record.settings
    if record.arm == PLS:
        return True
    is_final = settings["part"] == "test"
    rate = CHOSEN_RATE if is_final else settings["rate"]
    if rate is None or record.seed not in (FINAL_SEEDS if is_final else TUNING_SEEDS):
        return False
    return bool(settings == settings_of(rate, EPOCHS, settings["part"]))


def errors(records: Iterable[RunRecord]) -> np.ndarray:
    """Return the error after the last epoch, (seeds,)."""
    return np.array([record.curve["error"][-1] for record in records])


def rows(runs: dict[str, list[RunRecord]]) -> list[list[str]]:
    """Return the rows under HEAD; less error is better."""
    base = errors(runs[VANILLA])
    changes = {arm: interval(errors(runs[arm]) - base) for arm in ARMS if arm != VANILLA}
    cells = {VANILLA: ["", ""]}
    for arm, p in corrected_by_name(changes).items():
        cells[arm] = [changes[arm].text("+", DIGITS), p_text(p)]
    made = []
    for arm in ARMS:
        seconds = f"{np.mean([record.seconds[-1] for record in runs[arm]]):.0f}"
        made.append([arm, str(len(runs[arm])), interval(errors(runs[arm])).text(digits=DIGITS), *cells[arm], seconds])
    (pls,) = runs[PLS]
    made.append([PLS, "", interval(errors([pls])).text(digits=DIGITS), "", "", f"{pls.seconds[-1]:.0f}"])
    return made


def rate_rows(runs: dict[str, list[RunRecord]]) -> list[list[str]]:
    """Return vanilla's error on the validation blocks at each rate, by which the rate was chosen."""
    row = ["vanilla's error"]
    for rate in rates_of(runs):
        of_rate = [record for record in runs[VANILLA] if record.settings["rate"] == rate]
        row.append(interval(errors(of_rate)).text(digits=DIGITS))
    return [row]


def rates_of(runs: dict[str, list[RunRecord]]) -> list[float]:
    """Return vanilla's rates, rising."""
    return sorted({record.settings["rate"] for record in runs[VANILLA]})
