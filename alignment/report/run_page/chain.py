"""The run's stages as a picture: boxes in layers from left to right. An edge that skips layers passes through them in a
lane, one lane per source, so that edges never cross a box."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup

from alignment.config.evaluating import UNTRAINED_ARMS
from alignment.core.artifacts import REPORT
from alignment.report.kit import text
from alignment.report.run_page.run_records import Run, Stage
from alignment.stages.registry import produced_by

BASE = "base model"
"""The node of the run's base model; no stage can have a name with a space."""
BOX_WIDTH, BOX_HEIGHT = 138, 64
_CLASSES = {state: state for state in ("base", "done", "reused", "failed", "running")} | {"killed": "failed"}
"""Classes of the style sheet by the state of a stage; any other waits."""
COLUMN, ROW_GAP, LANE = 171, 14, 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A box of the picture: three lines of text, and the names of the nodes that it takes as inputs."""

    name: str
    state: str
    detail: str
    artifact: str
    inputs: list[str] = field(default_factory=list)


def nodes_of(run: Run) -> list[Node]:
    """The run's stages as nodes, each after its inputs; the base model comes first if a stage uses it."""
    known = {stage.name for stage in run.stages}
    nodes = [_node(stage, known) for stage in run.stages]
    if any(BASE in node.inputs for node in nodes):
        model = run.record.config.get("model")
        source = text.name(model.get("source") or "") if isinstance(model, dict) else ""
        nodes.insert(0, Node(name=BASE, state="base", detail=source.removeprefix("bundled:"), artifact=""))
    layer = layers(nodes)
    return sorted(nodes, key=lambda node: layer[node.name])


def _node(stage: Stage, known: set[str]) -> Node:
    inputs = []
    for _, reference in stage.inputs:
        source = reference.removeprefix("stage:")
        if reference in UNTRAINED_ARMS:
            inputs.append(BASE)
        elif reference.startswith("stage:") and source in known and source != stage.name:
            inputs.append(source)
    this_page = produced_by(stage.kind) == REPORT and stage.state == "running"
    detail = "this page" if this_page else stage.state
    if stage.seconds is not None and not this_page:
        detail += f" · {text.duration(stage.seconds)}"
    state = "done" if this_page else stage.state
    return Node(
        name=stage.name, state=state, detail=detail, artifact=stage.artifact, inputs=list(dict.fromkeys(inputs))
    )


def layers(nodes: list[Node]) -> dict[str, int]:
    """The length of the longest path to each node. A cycle (a damaged file) stops growing instead of hanging."""
    layer = {node.name: 0 for node in nodes}
    for _ in nodes:
        for node in nodes:
            below = [layer[source] + 1 for source in node.inputs if source in layer]
            layer[node.name] = min(max(below, default=0), len(nodes) - 1)
    return layer


Slot = tuple[str, bool]
"""A node's name, and whether the slot is only its lane through the layer."""


def _columns(nodes: list[Node], layer: dict[str, int]) -> list[list[Slot]]:
    """The slots of each layer from top to bottom, ordered to be near their sources."""
    columns: list[list[Slot]] = [[] for _ in range(max(layer.values()) + 1)]
    sources = {node.name: node.inputs for node in nodes}
    for node in nodes:
        columns[layer[node.name]].append((node.name, False))
        last = max((layer[other.name] for other in nodes if node.name in other.inputs), default=0)
        for between in range(layer[node.name] + 1, last):
            columns[between].append((node.name, True))
    for before, column in pairwise(columns):
        position = {name: index for index, (name, _) in enumerate(before)}

        def middle(slot: Slot, position: dict[str, int] = position) -> float:
            origins = [slot[0]] if slot[1] else sources[slot[0]]
            positions = [position[origin] for origin in origins if origin in position]
            return sum(positions) / len(positions) if positions else 0.0

        column.sort(key=lambda slot: (middle(slot), slot[1]))
    return columns


def _height(column: list[Slot]) -> int:
    return sum(LANE if lane else BOX_HEIGHT for _, lane in column) + ROW_GAP * (len(column) - 1)


def chain(run: Run) -> Markup:
    """The picture, empty for a run without stages."""
    nodes = nodes_of(run)
    if not nodes:
        return Markup("")
    layer = layers(nodes)
    columns = _columns(nodes, layer)
    height = max(_height(column) for column in columns)
    at: dict[tuple[str, int], tuple[float, float]] = {}  # (node, layer) → its slot's left edge and middle
    for index, column in enumerate(columns):
        top = (height - _height(column)) / 2
        for name, lane in column:
            size = LANE if lane else BOX_HEIGHT
            at[name, index] = (index * COLUMN, top + size / 2)
            top += size + ROW_GAP
    edges = Markup("").join(_edges(nodes, layer, at))
    boxes = [_box(node, at[node.name, layer[node.name]]) for node in nodes]
    width = (len(columns) - 1) * COLUMN + BOX_WIDTH
    return Markup(
        '<div class="scroll chain-scroll"><svg class="chain" viewBox="-2 -2 {} {:.0f}" width="{}" role="img" '
        'aria-label="The stages and what each takes as input">{}{}</svg></div>'
    ).format(width + 4, height + 4, width + 4, edges, Markup("").join(boxes))


def _edges(nodes: list[Node], layer: dict[str, int], at: dict[tuple[str, int], tuple[float, float]]) -> list[Markup]:
    """The pieces of all edges, without duplicates where edges of one source share a lane."""
    pieces: dict[str, None] = {}
    arrows = []
    for node in nodes:
        for source in node.inputs:
            x, y = at[source, layer[source]]
            x += BOX_WIDTH
            for index in range(layer[source] + 1, layer[node.name]):
                left, level = at[source, index]
                pieces[_bend(x, y, left, level)] = None
                pieces[f"M{left:.0f} {level:.1f}h{BOX_WIDTH}"] = None
                x, y = left + BOX_WIDTH, level
            left, level = at[node.name, layer[node.name]]
            if layer[source] < layer[node.name]:
                pieces[_bend(x, y, left - 6, level)] = None
                arrows.append(_arrow(left, level))
    return [Markup('<path class="edge" d="{}"/>').format(piece) for piece in pieces] + arrows


def _bend(x: float, y: float, end_x: float, end_y: float) -> str:
    middle = (x + end_x) / 2
    return f"M{x:.0f} {y:.1f}C{middle:.0f} {y:.1f} {middle:.0f} {end_y:.1f} {end_x:.0f} {end_y:.1f}"


def _arrow(x: float, y: float) -> Markup:
    return Markup('<path class="arrow" d="M{:.1f} {:.1f}l-8 -4v8z"/>').format(x - 0.5, y)


def _box(node: Node, centre: tuple[float, float]) -> Markup:
    x, middle = centre
    y = middle - BOX_HEIGHT / 2
    state = _CLASSES.get(node.state, "waiting")
    y_name = y + (21 if node.artifact else 28)
    spoken = " · ".join(part for part in (node.name, node.detail, node.artifact) if part)
    return Markup(
        '<g class="box {}"><title>{}</title><rect x="{:.0f}" y="{:.1f}" width="{:.0f}" height="{}" rx="7"/>'
        '<text class="name" x="{:.0f}" y="{:.1f}">{}</text><text class="detail" x="{:.0f}" y="{:.1f}">{}</text>'
        '<text class="artifact" x="{:.0f}" y="{:.1f}">{}</text></g>'
    ).format(
        *(state, spoken, x, y, BOX_WIDTH, BOX_HEIGHT),
        *(x + 11, y_name, text.name(node.name, limit=17)),
        *(x + 11, y_name + 16, text.name(node.detail, limit=23)),
        *(x + 11, y_name + 32, text.name(node.artifact, limit=19)),
    )
