"""The tree of a search as a self-contained HTML fragment: one SVG, a few lines of script, no network.

A dot is an agent: its size the number of its evaluations, its colour its posterior mean, its text (on hover or focus) what
changed against its parent. The line from the root to the best-belief agent is drawn thick.
"""

from __future__ import annotations

import difflib
import html
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from stillroom.search.archive import Archive

# Even steps of lightness that stay apart for all common kinds of colour vision, on light and dark pages.
_SCALE = ((68, 84, 160), (56, 130, 168), (58, 172, 140), (150, 200, 80), (250, 220, 60))
_STYLE = """
.tree { position: relative; overflow-x: auto }
.tree svg { display: block; min-width: 560px; width: 100%; height: auto }
.tree path { fill: none; stroke: currentColor; stroke-opacity: .28; stroke-width: 1.2 }
.tree path.best { stroke: var(--accent, #2563eb); stroke-opacity: 1; stroke-width: 3 }
.tree circle { stroke: currentColor; stroke-width: .8; cursor: pointer; outline: none }
.tree circle.best { stroke: var(--accent, #2563eb); stroke-width: 2.5 }
.tree circle:hover, .tree circle:focus { stroke-width: 3 }
.tree text { fill: currentColor; font: 12px system-ui, sans-serif }
.tree pre { position: absolute; display: none; z-index: 1; max-width: min(34rem, 90%); margin: 0;
  padding: .5rem .7rem; pointer-events: none;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 12px/1.45 ui-monospace, monospace; color: var(--ink, CanvasText);
  background: var(--card, Canvas); border: 1px solid var(--line, #888); border-radius: 6px; box-shadow: 0 4px 14px rgb(0 0 0 / .25) }
"""
_SCRIPT = """
(root => {
  const says = JSON.parse(root.querySelector('script[type="application/json"]').textContent), box = root.querySelector('pre');
  const hide = () => box.style.display = 'none';
  root.querySelectorAll('circle').forEach((dot, i) => {
    const show = () => {
      box.textContent = says[i];
      box.style.display = 'block';
      const here = dot.getBoundingClientRect(), frame = root.getBoundingClientRect();
      const left = here.right - frame.left + root.scrollLeft + 8, most = root.scrollLeft + root.clientWidth - box.offsetWidth - 4;
      box.style.left = Math.max(root.scrollLeft, Math.min(left, most)) + 'px';
      const below = here.bottom - frame.top + 8, above = Math.max(0, here.top - frame.top - box.offsetHeight - 8);
      box.style.top = (below + box.offsetHeight > root.clientHeight ? above : below) + 'px';
    };
    dot.addEventListener('mouseenter', show); dot.addEventListener('focus', show);
    dot.addEventListener('mouseleave', hide); dot.addEventListener('blur', hide);
  });
})(document.currentScript.parentElement);
"""


def patch(parent: Any, child: Any) -> str:
    """What a modification changed: keys of mappings, lines of texts, else the child as it is."""
    if isinstance(parent, Mapping) and isinstance(child, Mapping):
        keys = [key for key in {**parent, **child} if parent.get(key) != child.get(key)]
        return "\n".join(f"{key}: {parent.get(key, '(default)')} -> {child.get(key, '(default)')}" for key in keys)
    if isinstance(parent, str) and isinstance(child, str):
        lines = difflib.unified_diff(parent.splitlines(), child.splitlines(), lineterm="", n=0)
        return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))
    return str(child)


def tree(archive: Archive, best: int, show: Callable[[Any, Any], str] = patch) -> str:
    """The HTML fragment for an archive whose agent `best` is highlighted; `show(parent, child)` describes a modification."""
    place, width, height = _layout(archive)
    line = set(archive.lineage(best))
    edges, dots, texts = [], [], []
    means = [(1 + a.passed) / (2 + a.passed + a.failed) for a in archive.agents]
    low, high = min(means), max(means)
    for i, agent in enumerate(archive.agents):
        x, y = place[i]
        marked = ' class="best"' if i in line else ""
        if agent.parent is not None:
            px, py = place[agent.parent]
            bend = (px + x) / 2
            edges.append((i in line, f'<path{marked} d="M{px:.0f} {py:.0f}C{bend:.0f} {py:.0f} {bend:.0f} {y:.0f} {x:.0f} {y:.0f}"/>'))
        radius = 3 + math.sqrt(agent.passed + agent.failed)
        colour = _colour((means[i] - low) / (high - low) if high > low else 0.5)
        label = f"agent {i}{' (best belief)' if i == best else ''}: {agent.passed} of {agent.passed + agent.failed} passed"
        dots.append(
            f'<circle{marked} cx="{x:.0f}" cy="{y:.0f}" r="{radius:.1f}" fill="{colour}" tabindex="0" role="img" aria-label="{label}"/>'
        )
        born = f"child of {agent.parent}" if agent.parent is not None else "root"
        what = show(archive.agents[agent.parent].artefact, agent.artefact) if agent.parent is not None else str(agent.artefact)
        texts.append(f"{label}\nposterior mean {means[i]:.3f}, {born}\n\n{what[:1500]}".rstrip())
    ordered = "".join(edge for _, edge in sorted(edges))
    data = json.dumps(texts).replace("<", "\\u003c")
    title = html.escape(f"{len(archive.agents)} agents, {archive.finished} evaluations; line to the best-belief agent {best}")
    return (
        f'<div class="tree"><style>{_STYLE}</style><svg viewBox="0 0 {width} {height + 34}" role="group" aria-label="{title}">'
        f"{ordered}{''.join(dots)}{_legend(low, high, height + 14, title)}</svg><pre></pre>"
        f'<script type="application/json">{data}</script><script>{_SCRIPT}</script></div>\n'
    )


def _layout(archive: Archive) -> tuple[list[tuple[float, float]], int, int]:
    """Depth to the right, leaves below one another, parents halfway between their outermost children."""
    children: list[list[int]] = [[] for _ in archive.agents]
    for i, agent in enumerate(archive.agents):
        if agent.parent is not None:
            children[agent.parent].append(i)
    depth = [0] * len(archive.agents)
    row = [0.0] * len(archive.agents)
    leaves, stack = 0, [0]
    while stack:
        i = stack.pop()
        if not children[i]:
            row[i] = leaves
            leaves += 1
        for child in reversed(children[i]):
            depth[child] = depth[i] + 1
            stack.append(child)
    for i in range(len(row) - 1, -1, -1):
        if children[i]:
            row[i] = (row[children[i][0]] + row[children[i][-1]]) / 2
    across = max(1, *depth)
    width, slot = 1000, 20 if leaves < 60 else 14
    return [(24 + d * (width - 60) / across, 20 + r * slot) for d, r in zip(depth, row, strict=True)], width, 40 + (leaves - 1) * slot


def _colour(share: float) -> str:
    where = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
    i = min(int(where), len(_SCALE) - 2)
    return "#" + "".join(f"{round(a + (b - a) * (where - i)):02x}" for a, b in zip(_SCALE[i], _SCALE[i + 1], strict=True))


def _legend(low: float, high: float, top: int, title: str) -> str:
    steps = "".join(f'<rect x="{70 + 12 * i}" y="{top}" width="12" height="10" fill="{_colour(i / 9)}"/>' for i in range(10))
    return (
        f'<text x="24" y="{top + 10}">{low:.2f}</text>{steps}<text x="198" y="{top + 10}">{high:.2f} posterior mean; '
        f"size: evaluations; {title}</text>"
    )
