"""Published checksums of official archives, so that a file can be said to be the one that everybody uses.

MD5 is what their publishers state (the CIFAR page, torchvision's loaders of MNIST and EMNIST); it tells copies apart
and damage, not forgery. UCI, WISDM and LEAF publish none.
"""

from collections.abc import Mapping
from typing import Final

from fedeq_edge.data.archives.source import Digest

_OFFICIAL: Final = {
    "c32a1d4ab5d03f1284b67883e8d87530": "cifar-10-binary.tar.gz",
    "03b5dce01913d631647c71ecec9e9cb8": "cifar-100-binary.tar.gz",
    "58c8d27c78d21e728a6bc7b3cc06412e": "EMNIST's gzip.zip",
    "f68b3c2dcbeaaa9fbdd348bbdeb94873": "MNIST's train-images-idx3-ubyte.gz",
    "d53e105ee54ea40749a09fcbcd1e9432": "MNIST's train-labels-idx1-ubyte.gz",
    "9fb629c4189551a2d022fa330f9573f3": "MNIST's t10k-images-idx3-ubyte.gz",
    "ec29112dd5afa0611ce80d1b7f02629c": "MNIST's t10k-labels-idx1-ubyte.gz",
    "6bbc9ace898e44ae57da46a324031adb": "MNIST's train-images-idx3-ubyte",
    "a25bea736e30d166cdddb491f175f624": "MNIST's train-labels-idx1-ubyte",
    "2646ac647ad5339dbf082846283269ea": "MNIST's t10k-images-idx3-ubyte",
    "27ae3e4e09519cfbb04c329615203637": "MNIST's t10k-labels-idx1-ubyte",
}


def official_names(digests: Mapping[str, Digest]) -> tuple[str, ...]:
    """The published names of those of the files whose checksum is known."""
    return tuple(_OFFICIAL[digest.md5] for digest in digests.values() if digest.md5 in _OFFICIAL)
