"""Holds what several test files share: references, models, process groups, a Hub on loopback."""
