"""Holds the command `hf-tract`, which needs the extra `cli`."""
