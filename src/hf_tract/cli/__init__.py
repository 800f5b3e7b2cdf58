"""The command `hf-tract`, which needs the extra `cli`."""

from hf_tract.cli.main import app

__all__ = ["app"]
