"""Says what overhead's measurements mean: estimates with intervals, the bounds they keep, a table, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import CASES
from benchmarks.common import bootstrap, markdown
from benchmarks.common.bootstrap import FAIL, UNDECIDED, Estimate
from benchmarks.common.records import RunRecord, read_records

VANILLA, AGAIN, OURS, THEIRS = ARMS = ("vanilla", "vanilla again", "hf-tract", "torch_tract")
# The record of each arm that could be measured.
Result = dict[str, RunRecord]
Results = dict[str, Result]
HEADS = (
    "measurement",
    "vanilla, ms",
    *(f"{arm}, times" for arm in ARMS[1:]),
    "hf-tract by the layer",
    "hf-tract adds, ms",
    "torch_tract adds, ms",
    "ratio of both",
    "hf-tract adds, MiB",
    "torch_tract adds, MiB",
)
NOTE = """Medians over turns with 95 % bootstrap intervals. "vanilla again" is the same work once more, which shows the
noise. "by the layer" is 1 + what hf-tract adds to the first layer alone, over the time of vanilla's step."""
TICKS = (0.6, 0.8, 1, 1.25, 1.5, 2, 3, 4)
# Of the arms from the middle of a measurement's row.
SHIFTS = (-0.24, 0, 0.24)


@dataclass(frozen=True)
class Check:
    """Compares an estimate with its bound."""

    what: str
    estimate: Estimate
    bound: float
    # The key of the measurement of which more turns make the interval narrower.
    repeat: str

    @property
    def verdict(self) -> str:
        """Return pass, fail or undecided."""
        return self.estimate.verdict(self.bound)

    def text(self) -> str:
        """Return the verdict in words."""
        return f"{self.verdict}: {self.what}: {self.estimate.text()}, allowed {self.bound:g}"


def key_of(settings: dict[str, Any]) -> str:
    """Return the name of a measurement."""
    names = ("model", "scope", "device", "precision", "form", "batch")
    parts = [str(settings[name]) for name in names]
    if settings["scope"] == "step" and settings["optimizer"] != "sgd":
        parts.append(settings["optimizer"])
    if settings["channels_last"]:
        parts.append("channels_last")
    return " | ".join(parts)


def read_results(path: Path) -> Results:
    """Return the records of a file by measurement and arm."""
    results: Results = {}
    for record in read_records(path, latest=True).values():
        results.setdefault(key_of(record.settings), {})[record.arm] = record
    return results


def times(result: Result, arm: str) -> np.ndarray:
    """Return the seconds of an arm, (turns,)."""
    return np.array(result[arm].seconds)


def ratio(result: Result, arm: str) -> Estimate | None:
    """Return the time of an arm over vanilla's."""
    if arm not in result:
        return None
    return bootstrap.median(times(result, arm) / times(result, VANILLA))


def added(result: Result, arm: str) -> Estimate | None:
    """Return the seconds of an arm above vanilla's."""
    if arm not in result:
        return None
    return bootstrap.median(times(result, arm) - times(result, VANILLA))


def added_over_theirs(result: Result) -> Estimate | None:
    """Return the seconds that hf-tract adds to a layer over those that torch_tract adds; None for a step."""
    if OURS not in result or THEIRS not in result or result[OURS].settings["scope"] == "step":
        return None
    both = np.stack([times(result, OURS), times(result, THEIRS)], axis=1)
    return bootstrap.ratio_of_medians(both - times(result, VANILLA)[:, None])


def by_layer(key: str, results: Results) -> Estimate | None:
    """Return a step's time over vanilla's as the first layer alone tells it; None where that was not measured."""
    step = results[key][VANILLA]
    layer = results.get(_layer_key(step))
    if step.settings["scope"] != "step" or layer is None or OURS not in layer:
        return None
    difference = times(layer, OURS) - times(layer, VANILLA)
    return bootstrap.one_plus_share(difference, np.array(step.seconds))


def _layer_key(record: RunRecord) -> str:
    return key_of({**record.settings, "scope": "layer"})


def bytes_added(result: Result, arm: str) -> float | None:
    """Return the peak memory of an arm above vanilla's."""
    if arm not in result or not result[arm].curve["peak_bytes"]:
        return None
    return result[arm].curve["peak_bytes"][0] - result[VANILLA].curve["peak_bytes"][0]


def checks_of(results: Results, keys: Sequence[str]) -> list[Check]:
    """Compare these measurements with their bounds."""
    checks: list[Check] = []
    for key in keys:
        result = results.get(key, {})
        if OURS not in result:
            continue
        if result[OURS].settings["scope"] == "step":
            checks.extend(_step_checks(key, results))
        else:
            checks.extend(_layer_checks(key, result))
        checks.extend(_memory_checks(key, result))
    return checks


def _step_checks(key: str, results: Results) -> Iterator[Check]:
    """Judge a step by the layer's difference, on a GPU by its own ratio.

    On a CPU a step's own ratio is lost in the noise. On a GPU it is not, and a layer alone is too short there: the
    host, which otherwise runs ahead, holds it up.
    """
    settings = results[key][OURS].settings
    device = settings["device"].partition(":")[0]
    bound = CASES[settings["model"]].step_bound.get(device)
    if bound is None:
        return
    layer = by_layer(key, results)
    if device == "cpu" and layer is not None:
        yield Check(f"{key}: step by the layer", layer, bound, _layer_key(results[key][OURS]))
        return
    own = ratio(results[key], OURS)
    assert own is not None
    yield Check(f"{key}: step by its own ratio", own, bound, key)


def _layer_checks(key: str, result: Result) -> Iterator[Check]:
    bound = _layer_bound(result)
    both = added_over_theirs(result)
    if bound is not None and both is not None:
        yield Check(f"{key}: added time over torch_tract's", both, bound, key)


def _layer_bound(result: Result) -> float | None:
    """Return how much of torch_tract's time hf-tract may add to a first layer; None for no bound."""
    settings = result[OURS].settings
    case = CASES[settings["model"]]
    if settings["device"] != "cpu" or settings["scope"] != "layer":
        return None
    if settings["batch"] < case.bounded_from:
        return None
    return case.layer_bound


def _memory_checks(key: str, result: Result) -> Iterator[Check]:
    above = bytes_added(result, OURS)
    if above is None:
        return
    bound = CASES[result[OURS].settings["model"]].memory_bound()
    mib = round(above / 2**20, 1)
    yield Check(f"{key}: MiB above vanilla's peak", Estimate(mib, mib, mib), bound // 2**20, key)


def unjudged(results: Results, keys: Sequence[str]) -> list[str]:
    """Return what was asked for but could not be measured, in words."""
    problems = []
    for key in keys:
        result = results.get(key)
        if result is None:
            problems.append(f"{UNDECIDED}: {key}: not measured")
            continue
        left_out = result[VANILLA].settings["left_out"]
        if OURS not in result:
            problems.append(f"{FAIL}: {key}: {OURS} {left_out[OURS]}")
        elif THEIRS not in result and _layer_bound(result) is not None:
            problems.append(f"not judged: {key}: {THEIRS} {left_out[THEIRS]}")
    return problems


def print_verdicts(results: Results, keys: Sequence[str]) -> int:
    """Print what passes, what fails and what is undecided; return the exit code, 0, 1 or 2."""
    lines = [check.text() for check in checks_of(results, keys)]
    lines.extend(unjudged(results, keys))
    for line in sorted(lines):
        print(line)
    for code, verdict in ((1, FAIL), (2, UNDECIDED)):
        if any(line.startswith(verdict) for line in lines):
            return code
    return 0


def print_table(results: Results) -> None:
    """Print the table, in Markdown."""
    rows = []
    for key, result in results.items():
        cells = [key.replace(" | ", ", "), bootstrap.median(times(result, VANILLA)).text(1000, 1)]
        cells.extend(_ratio_cell(result, arm) for arm in ARMS[1:])
        cells.append(_cell(by_layer(key, results)))
        cells.extend(_cell(added(result, arm), 1000, 2) for arm in (OURS, THEIRS))
        cells.append(_cell(added_over_theirs(result), 1, 2))
        cells.extend(_mib_cell(result, arm) for arm in (OURS, THEIRS))
        rows.append(cells)
    print(*markdown.table(HEADS, rows), NOTE, sep="\n")


def _ratio_cell(result: Result, arm: str) -> str:
    """Return the ratio, or in a word why there is none."""
    if arm in result:
        return _cell(ratio(result, arm))
    reason: str = result[VANILLA].settings["left_out"].get(arm, "")
    return reason.partition(":")[0]


def _cell(value: Estimate | None, factor: float = 1, digits: int = 3) -> str:
    if value is None:
        return ""
    return value.text(factor, digits)


def _mib_cell(result: Result, arm: str) -> str:
    above = bytes_added(result, arm)
    if above is None:
        return ""
    return f"{above / 2**20:.1f}"


def write_json(results: Results, path: Path) -> None:
    """Write every estimate and every verdict."""
    measurements = [_summary(key, results) for key in results]
    path.write_text(json.dumps(measurements, indent=1) + "\n", encoding="utf-8")


def _summary(key: str, results: Results) -> dict[str, Any]:
    """Return what one measurement says, for JSON."""
    result = results[key]
    vanilla = result[VANILLA]
    row: dict[str, Any] = {"measurement": key}
    row.update(vanilla.settings)
    row["turns"] = len(vanilla.seconds)
    row["vanilla_seconds"] = bootstrap.median(times(result, VANILLA)).as_json()
    row["times_vanilla_by_layer"] = _json(by_layer(key, results))
    row["added_over_torch_tract"] = _json(added_over_theirs(result))
    for name in ("times_vanilla", "seconds_added", "bytes_added"):
        row[name] = {}
    for arm in ARMS[1:]:
        row["times_vanilla"][arm] = _json(ratio(result, arm))
        row["seconds_added"][arm] = _json(added(result, arm))
        row["bytes_added"][arm] = bytes_added(result, arm)
    row["checks"] = []
    for check in checks_of(results, [key]):
        row["checks"].append({"verdict": check.verdict, "text": check.text()})
    for name in ("seed", "command", "commit", "versions", "hardware"):
        row[name] = getattr(vanilla, name)
    return row


def _json(value: Estimate | None) -> list[float | None] | None:
    if value is None:
        return None
    return value.as_json()


def plot(results: Results, path: Path) -> None:
    """Draw each measurement's time over vanilla's: every turn, the median and its interval."""
    try:
        from benchmarks.common import plots
    except ImportError as error:
        print(f"No plot, since {error.name} is not installed.")
        return
    figure, [[axis]] = plots.new_figure(1, 1, 9, 1.4 + 0.5 * len(results))
    for arm, color, shift in zip(ARMS[1:], plots.COLORS, SHIFTS, strict=False):
        label: str | None = arm
        for row, result in enumerate(results.values(), 1):
            found = ratio(result, arm)
            if found is None:
                continue
            turns = times(result, arm) / times(result, VANILLA)
            height = row + shift
            heights = np.full(len(turns), height)
            axis.plot(turns, heights, ".", color=color, alpha=0.3)
            axis.plot(found[1:], heights[:2], color=color, linewidth=2, label=label)
            axis.plot(found.value, height, "|", color=color, markersize=11)
            label = None
    axis.axvline(1, color=plots.BASE, linewidth=0.8)
    axis.set_title("Time over vanilla's: turns, median, 95 % interval")
    axis.set_xlabel("times vanilla")
    axis.set_xscale("log")
    names = [key.replace(" | ", ", ") for key in results]
    axis.set_yticks(range(1, 1 + len(names)), names)
    axis.set_xticks(TICKS, map(str, TICKS))
    axis.minorticks_off()
    axis.invert_yaxis()
    plots.legend_beside(axis)
    print(f"Plot: {plots.save(figure, path)}")
