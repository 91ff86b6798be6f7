"""Which kinds of archives there are, and which one a source is."""

from collections.abc import Mapping
from typing import Final

from fedeq_edge.data.archives.cifar import CIFAR10, CIFAR100, refuse_pickles
from fedeq_edge.data.archives.har import HAPT, HAR
from fedeq_edge.data.archives.idx import EMNIST, MNIST
from fedeq_edge.data.archives.leaf import FEMNIST, SHAKESPEARE
from fedeq_edge.data.archives.samples import Reader, Samples
from fedeq_edge.data.archives.source import Source
from fedeq_edge.data.archives.wisdm import WISDM
from fedeq_edge.errors import ConfigError, DataError

_READERS: Final = (HAR, HAPT, WISDM, MNIST, EMNIST, FEMNIST, CIFAR10, CIFAR100, SHAKESPEARE)
KINDS: Final[Mapping[str, Reader]] = {reader.kind: reader for reader in _READERS}


def recognise(source: Source, kind: str | None) -> Reader:
    """The reader of that kind, or of the kind that the contents show. Raises DataError where they are another."""
    refuse_pickles(source)
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"--kind {kind}: no such kind; choose {', '.join(KINDS)}")
    fitting = [reader for reader in _READERS if reader.fits(source)]
    chosen = [reader for reader in fitting if kind in (None, reader.kind)]
    if len(chosen) == 1:
        return chosen[0]
    looks = " or ".join(reader.kind for reader in fitting)
    if kind is not None:
        seen = f"it looks like --kind {looks}" if looks else f"it holds {_first_names(source)}"
        raise DataError(f"{source.path}: no {KINDS[kind].holds} in it; {seen}")
    if chosen:
        raise DataError(f"{source.path}: it may be {looks}; choose with --kind")
    raise DataError(
        f"{source.path}: it holds {_first_names(source)}, which is none of {', '.join(KINDS)}; "
        "give the official archive or its folder"
    )


def read(source: Source, kind: str | None, variant: str | None) -> tuple[Reader, str, Samples]:
    """(reader, variant, samples) of a source. Raises DataError or ConfigError, with the remedy."""
    reader = recognise(source, kind)
    known = reader.variants
    if variant is not None and variant not in known:
        remedy = f"choose {', '.join(known)}" if known else "leave it away"
        raise ConfigError(f"--variant {variant}: {reader.kind} has no such; {remedy}")
    chosen = variant or (known[0] if known else "")
    return reader, chosen, reader.read(source, chosen)


def _first_names(source: Source) -> str:
    return f"{', '.join(source.names[:3])}{', ...' if len(source.names) > 3 else ''}" or "no file"
