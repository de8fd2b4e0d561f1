"""How every command ends: what the user can mend is said in one line, with exit status 2; a fault of ours shows itself
whole."""

import functools
import sys
from collections.abc import Callable


def command(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """A command's main(arguments) that returns its exit status, 130 where it was interrupted."""

    @functools.wraps(main)
    def wrapped(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments)
        except (ValueError, OSError, MemoryError) as error:  # the package's own errors are kinds of ValueError
            print(f"Stopped: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
            return 130

    return wrapped
