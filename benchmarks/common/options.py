"""Makes the parser of each command's options."""

import argparse


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as it is written, and the default of each option."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if isinstance(action.default, (bool, list, type(None))) or not action.default:
            return action.help
        return super()._get_help_string(action)


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help begins with the docstring of the command."""
    return argparse.ArgumentParser(description=description, formatter_class=_Help)


def options_of(commands: argparse._SubParsersAction, name: str, help: str) -> argparse.ArgumentParser:  # type: ignore[type-arg]
    """Return the parser of one of several commands."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, formatter_class=_Help)
    return parser
