"""Copy the example app: `python -m fedeq_edge.flower DIR`, and say how it is run."""

import shutil
import sys
from pathlib import Path

from fedeq_edge.errors import ConfigError

EXAMPLE = Path(__file__).parent / "example"


def copy_example(folder: Path) -> None:
    """`folder` is a Flower app of its own. Raises ConfigError where something is there already."""
    try:
        shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    except FileExistsError as error:
        raise ConfigError(f"{folder} exists already; give a folder that does not") from error


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 1 failed, 2 misused."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m fedeq_edge.flower DIR", file=sys.stderr)
        return 2
    try:
        copy_example(Path(arguments[0]))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"run it: flwr run {arguments[0]} --federation-config num-supernodes=10 --stream", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
