"""Runs `hf-tract`, also as `python -m hf_tract`."""

import sys


def main() -> None:
    """Run the command line, which needs the packages of the extra `cli`."""
    try:
        from hf_tract.cli.main import app

        app(prog_name="hf-tract")
    except ModuleNotFoundError as error:
        sys.exit(f"hf-tract's command line needs another package ({error}): pip install 'hf-tract[cli]'")


if __name__ == "__main__":
    main()
