"""Describes an experiment as data, and lists the runs that it takes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from benchmarks.common.records import key_of
from benchmarks.training.recipe import RECIPES, field_names

SCALES = ("full", "small", "smoke")
SMALL_SEEDS = 3
# No other run has this seed.
DONOR_SEED = 90
Changes = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """Holds runs that belong together: each arm in each setting, from several seeds."""

    title: str
    recipe: str
    # "WHAT; N epochs": smaller scales have epochs of their own, so only WHAT differs there
    settings: dict[str, Changes]
    arms: dict[str, Changes]
    small: Changes
    smoke: Changes
    full_seeds: int = 5
    small_seeds: int = SMALL_SEEDS
    first_seed: int = 0
    # The most seeds of arms that are only there to be looked at.
    at_most: Mapping[str, int] = field(default_factory=dict)
    # How many arms stand next to each other, so that their times compare; 0 is all.
    neighbours: int = 0
    # Of a choice: how many cells of each arm go on to the seeds behind the first; 0 is all.
    finalists: int = 0
    # The settings of smaller scales, where they are not all.
    few: tuple[str, ...] = ()
    # Arms that only the full scale has.
    left_out: tuple[str, ...] = ()
    # Another arm that gains are told from, beside the first.
    reference: str = ""
    # The recipe of a second stage, which goes on from the first one's model.
    then: str | None = None

    def jobs(self, scale: str, seeds: int | None = None) -> Iterator[Job]:
        """List what is to be run: the first seed of everything before the second.

        Each seed begins with another one of neighbouring arms, so that the same do not always run at the same time.
        """
        count = seeds or self._usual_seeds(scale)
        for seed in range(self.first_seed, self.first_seed + count):
            seen: set[str] = set()
            pairs = itertools.product(self._settings(scale), self.arm_names(scale))
            for setting, arm in self._turned(list(pairs), seed - self.first_seed):
                if seed - self.first_seed >= self.at_most.get(arm, count):
                    continue
                config = self.config(scale, setting, arm)
                job = Job(self, scale, self._label(scale, setting), arm, seed, config)
                if job.key not in seen:
                    seen.add(job.key)
                    yield job

    def _turned(self, pairs: list[tuple[str, str]], turn: int) -> Iterator[tuple[str, str]]:
        """Yield neighbours after neighbours, each from the `turn`-th on and around."""
        size = self.neighbours or len(pairs)
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            first = turn % len(part)
            yield from part[first:]
            yield from part[:first]

    def _usual_seeds(self, scale: str) -> int:
        if scale == "smoke":
            return 1
        if scale == "small":
            return min(self.small_seeds, self.full_seeds)
        return self.full_seeds

    def _settings(self, scale: str) -> list[str]:
        """Return the names of the settings."""
        if scale == "full" or not self.few:
            return list(self.settings)
        return [name for name in self.settings if name in self.few]

    def _label(self, scale: str, setting: str) -> str:
        """Return the name of a setting at a scale, without the epochs that it does not have there."""
        if scale == "full":
            return setting
        if "; " in setting or self.few:
            return setting.split("; ")[0]
        return ""

    def arm_names(self, scale: str) -> list[str]:
        """Return the names of the arms; at the smoke scale one of those that differ in a number alone."""
        if scale == "full":
            return list(self.arms)
        names = [name for name in self.arms if name not in self.left_out]
        if scale == "small":
            return names
        first_of_kind: dict[tuple[str, ...], str] = {}
        for name in names:
            first_of_kind.setdefault(_kind(self.arms[name]), name)
        return list(first_of_kind.values())

    def config(self, scale: str, setting: str, arm: str) -> Changes:
        """Return the fields of a recipe, `donor`, and the options of benchmarks.paper.train, of one run."""
        whole = {**read_values(self.recipe), **self.settings[setting]}
        changes = self.arms[arm]
        shrunk: Changes = {"full": {}, "small": self.small, "smoke": self.smoke}[scale]
        config = {**whole, **shrunk, **changes}
        # An arm that is shorter stays so.
        if shrunk and "epochs" in changes:
            part = shrunk["epochs"] / whole["epochs"]
            config["epochs"] = round(part * changes["epochs"])
            if "decay_milestones" in changes:
                milestones = {max(1, round(part * at)) for at in changes["decay_milestones"]}
                config["decay_milestones"] = sorted(milestones)
        return config


def _kind(arm: Changes) -> tuple[str, ...]:
    """Return what an arm changes, without the numbers."""
    kind = []
    for name, value in arm.items():
        if name == "layers":
            kind += value
        else:
            kind.append(value if name == "variant" else name)
    return tuple(kind)


@dataclass(frozen=True)
class Job:
    """Describes one run."""

    experiment: Experiment
    scale: str
    setting: str
    arm: str
    seed: int
    config: Changes

    @property
    def donor(self) -> Donor | None:
        """Return the run whose trained first layer this one starts from, if there is one."""
        if "donor" not in self.config:
            return None
        config = {**self.config, "variant": "none", "no_tract": False, **self.config["donor"]}
        del config["donor"]
        recipe = self._recipe_of(config) | {"seed": DONOR_SEED}
        return Donor(key_of(config, DONOR_SEED), recipe, _options(config))

    @property
    def key(self) -> str:
        """Return the same for runs that are the same, whichever experiment asks for them."""
        return key_of(self.config, self.seed, self.experiment.then)

    def stages(self) -> list[Changes]:
        """Return what the recipe file of each stage holds."""
        stages = [self._recipe_of(self.config)]
        if self.experiment.then:
            second = read_values(self.experiment.then)
            if self.scale == "smoke":
                second = second | self.experiment.smoke
            stages.append(self._recipe_of(second))
        return stages

    def _recipe_of(self, values: Changes) -> Changes:
        known = {name: values[name] for name in field_names() if name in values}
        return known | {"seed": self.seed}

    def options(self) -> list[str]:
        """Return those of benchmarks.paper.train beside the recipe."""
        return _options(self.config)


def _options(config: Changes) -> list[str]:
    options = ["--variant", config.get("variant", "none")]
    for flag in ("no_tract", "emulate_bf16", "relative_lam"):
        if config.get(flag):
            options.append(f"--{flag}")
    if "first_rate" in config:
        options += ["--first_rate", str(config["first_rate"])]
    if "layers" in config:
        options += ["--layers", *config["layers"]]
    return options


class Donor(NamedTuple):
    """Describes a run that other runs take the first layer from."""

    key: str
    recipe: Changes
    # Those of benchmarks.paper.train.
    options: list[str]


@functools.cache
def read_values(recipe: str) -> Changes:
    """Return the values of a recipe, by the name of its file."""
    values: Changes = yaml.safe_load((RECIPES / recipe).read_text(encoding="utf-8"))
    return values
