"""`fedeq device csr|enrol` of a board without the rest of the command line, which takes a second to load."""

import argparse
import sys
from pathlib import Path

from fedeq_edge.errors import FedEqError, ProvisionError
from fedeq_edge.provision import enrol

parser = argparse.ArgumentParser()
parser.add_argument("noun", choices=["device"])
parser.add_argument("verb", choices=["csr", "enrol"])
parser.add_argument("--device")
parser.add_argument("--join", type=Path)
parser.add_argument("--folder", type=Path)
chosen = parser.parse_args()
try:
    if chosen.verb == "csr":
        sys.stdout.buffer.write(enrol.csr(chosen.folder, chosen.device))
    else:
        enrol.join(chosen.join, chosen.folder)
except FedEqError as error:
    print(f"fedeq: {error}", file=sys.stderr)
    sys.exit(error.exit if isinstance(error, ProvisionError) else 1)
