"""Repeats the experiments of the paper, and tries others beside them."""
