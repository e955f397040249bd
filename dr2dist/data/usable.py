"""Which samples of a shard have what the others have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dr2dist.data.decoders import IMAGE_TYPES
from dr2dist.data.members import Sample
from dr2dist.data.scan import Scanned


def kind_of(extension: str) -> str:
    """What an extension is of: all images are `image`, `seg.png` is `seg.image`."""
    head, dot, last = extension.rpartition(".")
    return f"{head}{dot}{'image' if last in IMAGE_TYPES else last}"


def kinds_of(sample: Sample) -> set[str]:
    """Kinds of a sample's members."""
    return {kind_of(extension) for extension in sample.extensions}


def needed_kinds(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Kinds that over half of the samples have."""
    counts = Counter(kind for sample in samples for kind in kinds_of(sample))
    return tuple(sorted(kind for kind, count in counts.items() if 2 * count > len(samples)))


def only_usable(found: Scanned, needs: Sequence[str]) -> Scanned:
    """The same without samples that lack a needed kind, which are named."""
    wanted, kept = set(needs), []
    for sample in found.samples:
        lacking = sorted(wanted - kinds_of(sample))
        if lacking:
            found.left.append((sample.key, f"has no {' and no '.join(lacking)}"))
        else:
            kept.append(sample)
    found.samples = kept
    return found
