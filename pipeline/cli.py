"""What the command lines share: options from a dataclass, exit codes, warnings on stderr."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.errors import UserError

C = TypeVar("C")


def parse(config: type[C], description: str, argv: list[str] | None) -> C:
    """Parse ``argv`` into ``config``; help texts are the docstrings under its fields.

    Fields without a default become positional. Exits with code 2 on an unknown or malformed option.
    """
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description)
    parser.add_argument("--config", action="config", help="a YAML file with any of the options below")
    parser.add_class_arguments(config, as_positional=True)
    values = parser.parse_args(argv).as_dict()
    values.pop("config", None)
    try:
        return config(**values)
    except UserError as error:
        parser.error(str(error))


def run(main: Callable[[], Any]) -> int:
    """Run a command: 0 on success, 2 on a UserError, 130 on Ctrl-C; anything else is our bug and shows its traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def quiet_libraries() -> None:
    """Silence what says nothing to our user: device tips, worker counts, deprecations inside libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    for pattern in (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*", ".*srun.*"):
        warnings.filterwarnings("ignore", pattern)


def note(message: str) -> None:
    """A line for the person at the terminal (stderr, so that stdout stays machine-readable)."""
    print(message, file=sys.stderr, flush=True)
