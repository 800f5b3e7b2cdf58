"""`hf-tract`, also as `python -m hf_tract`."""

import sys


def main() -> None:
    """Runs the command line, for which typer and rich are needed."""
    try:
        from hf_tract.cli import app
    except ImportError as error:
        sys.exit(f"hf-tract's command line needs typer and rich ({error}): pip install 'hf-tract[cli]'")
    app(prog_name="hf-tract")


if __name__ == "__main__":
    main()
