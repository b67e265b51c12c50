"""The picture of ``map --html``: one file that needs nothing else, each cell some clusters of the image's file."""

from __future__ import annotations

from importlib import resources
from typing import Final

import numpy as np

from cowfence.errors import Invalid
from cowfence.ops.layout import WORDS, Layout, Use, layout
from cowfence.storage.publish import NewFile
from cowfence.units import format_size

_MOST_CELLS: Final = 6000


def write_page(image: str, path: str, *, force_share: bool) -> None:
    """Raises Invalid where jinja2 is not installed, and as ``layout`` and ``NewFile`` do."""
    try:
        import jinja2
    except ImportError:
        raise Invalid("a picture needs jinja2: pip install 'cowfence[report]'") from None
    found = layout(image, force_share=force_share)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(resources.files("cowfence.cli").joinpath("map.html.j2").read_text("utf-8"))
    text = template.render(
        filename=found.filename if found.filename.isprintable() else ascii(found.filename),
        virtual=format_size(found.virtual_bytes),
        file=format_size(len(found.uses) * found.cluster_bytes),
        cluster=format_size(found.cluster_bytes),
        totals=[
            (use.name.lower(), WORDS[use], count, format_size(count * found.cluster_bytes))
            for use, count in found.totals().items()
        ],
        cells=_cells(found),
        per_cell=_per_cell(found),
    )
    with NewFile(path) as new:
        new.storage.writev(0, (text.encode(),), "page.write")
        new.publish()


def _per_cell(found: Layout) -> int:
    return max(1, -(-len(found.uses) // _MOST_CELLS))


def _cells(found: Layout) -> list[tuple[str, str]]:
    """(class, what it says) of each cell. Of several clusters the rarest use is shown: one that is in danger is not hidden."""
    step = _per_cell(found)
    cells = []
    for first in range(0, len(found.uses), step):
        part = found.uses[first : first + step]
        counts = np.bincount(part, minlength=len(Use))
        shown = Use(int(part.max()))
        words = ", ".join(f"{WORDS[use]}{f' {counts[use]}' if step > 1 else ''}" for use in Use if counts[use])
        last = first + len(part) - 1
        where = f"cluster {first}" if first == last else f"clusters {first} to {last}"
        cells.append((shown.name.lower(), f"{where}, from {first * found.cluster_bytes:#x}: {words}"))
    return cells
