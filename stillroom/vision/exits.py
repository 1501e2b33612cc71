"""What the exits of a frozen classifier see, kept in the store."""

from __future__ import annotations

from stillroom.adapt.exits import Exits, Table, features_of
from stillroom.core.run import Run
from stillroom.data.images import Split


def table(run: Run, exits: Exits, split: Split) -> Table:
    """The split's table, computed once and kept in the store."""
    tensors = run.cached("exit-features", features_of, exits.net, tuple(exits.paths), split)
    return Table([tensors[str(exit)] for exit in range(len(exits.paths))], tensors["final"], split.labels)
