"""What a request may change in the adapter while it is answered: which experts are allowed, how many, how they are mixed.

`Intervention`s are compiled to the router bias and the `Gates` that a backend takes, for that request alone. Pure; no model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ming_app.engine.types import Gates, Intervention
from ming_app.errors import UsageError
from ming_app.molora.config import PROJECTIONS

BANNED = np.float32(-1e6)  # far below any logit, and finite: -inf times nought is no number
FORCED = np.float32(1e4)  # takes all the weight, and leaves float32 the digits that order the others
WORDS = re.compile(
    r"(?P<kind>[a-z]+)(?::(?P<value>\d{1,4}))?(?:@(?P<layers>\d{1,4}(?:-\d{1,4})?))?(?:/(?P<projections>[a-z+]+))?"
)


@dataclass(frozen=True)
class Compiled:
    """`bias` float32 [L, P, E] or None; `gates` of one row, or None when experts are mixed as trained."""

    bias: np.ndarray | None
    gates: Gates | None

    @property
    def rows(self) -> np.ndarray | None:
        """The bias of a batch of one row, [1, L, P, E]."""
        return None if self.bias is None else self.bias[None]

    def largest_k(self, top_k: int) -> int:
        """Experts per cell that a trace of the request shows; `top_k` is the adapter's."""
        return top_k if self.gates is None else int(self.gates.top_k.max())


def compile_interventions(
    interventions: Sequence[Intervention], layers: int, experts: int, top_k: int, bias: np.ndarray | None = None
) -> Compiled:
    """Later interventions come on top of earlier ones. `bias` float32 [L, P, E] is a router bias to start from.

    Where bans leave fewer experts than k, k becomes what is left. Raises UsageError for anything out of range, and when a
    ban leaves a router no expert.
    """
    if not interventions:
        return Compiled(bias, None)
    added = np.zeros((layers, len(PROJECTIONS), experts), np.float32) if bias is None else bias.astype(np.float32)
    banned = np.zeros(added.shape, bool)
    gates = Gates.unchanged(1, layers, len(PROJECTIONS), top_k)
    for one in interventions:
        _check(one, layers, experts)
        first, last = one.layers or (0, layers - 1)
        for projection in one.projections:
            rows, p = slice(first, last + 1), PROJECTIONS.index(projection)
            if one.kind == "ban":
                banned[rows, p, one.value] = True
            elif one.kind == "force":
                added[rows, p, one.value] += FORCED
            elif one.kind == "k":
                gates.top_k[0, rows, p] = one.value
            elif one.kind == "uniform":
                gates.uniform[0, rows, p] = True
            else:
                gates.strength[0, rows, p] = 0
        if one.kind == "base":
            gates.attention[0, first : last + 1] = 0
    left = experts - banned.sum(-1)
    if not left.all():
        layer, p = (int(i) for i in np.argwhere(left == 0)[0])
        raise UsageError(
            f"Every expert of layer {layer}, {PROJECTIONS[p]} is banned; at least one must remain. To switch a layer off, use off.",
            f"第 {layer} 层 {PROJECTIONS[p]} 的所有专家都被禁用，至少需保留一个。若要关闭该层，请使用 off。",
        )
    gates.top_k[0] = np.minimum(gates.top_k[0], left)
    added[banned] = BANNED
    return Compiled(added if added.any() else None, None if gates.changes_nothing(top_k) else gates)


def parse_intervention(text: str) -> Intervention:
    """`ban:2@0-11/gate+up`: kind, then expert or k, then layers (one, or first-last), then projections; the last two may be
    left out for all. Kinds: ban, force, k, uniform, off (experts of those layers), base (experts and attention LoRA).

    Raises UsageError.
    """
    match = WORDS.fullmatch(text.strip())
    if not match or match["kind"] not in Intervention.KINDS:
        raise UsageError(
            f"{text!r} is not an intervention; write for example ban:2, force:0@4-11, k:1, uniform/down, off@0-3 or base.",
            f"{text!r} 不是有效的干预；示例：ban:2、force:0@4-11、k:1、uniform/down、off@0-3、base。",
        )
    layers = None
    if match["layers"]:
        first, _, last = match["layers"].partition("-")
        layers = (int(first), int(last or first))
    projections = tuple((match["projections"] or "+".join(PROJECTIONS)).split("+"))
    return Intervention(match["kind"], int(match["value"]) if match["value"] else None, layers, projections)


def written(one: Intervention) -> str:
    """The text that `parse_intervention` reads."""
    value = "" if one.value is None else f":{one.value}"
    layers = "" if one.layers is None else f"@{one.layers[0]}-{one.layers[1]}"
    return one.kind + value + layers + ("" if one.projections == PROJECTIONS else f"/{'+'.join(one.projections)}")


def described(interventions: Sequence[Intervention]) -> dict[str, list[str]]:
    """Entry of a trace's config; empty without interventions."""
    return {"interventions": [written(one) for one in interventions]} if interventions else {}


def _check(one: Intervention, layers: int, experts: int) -> None:
    first, last = one.layers or (0, layers - 1)
    if not 0 <= first <= last < layers:
        raise UsageError(
            f"Layers {first} to {last} do not exist; the model has layers 0 to {layers - 1}.",
            f"第 {first} 至 {last} 层不存在；模型的层号为 0 到 {layers - 1}。",
        )
    low, high = {"ban": (0, experts - 1), "force": (0, experts - 1), "k": (1, experts)}.get(one.kind, (0, -1))
    if low <= high and not (one.value is not None and low <= one.value <= high):
        raise UsageError(
            f"{one.kind} needs a number from {low} to {high}, got {one.value}.",
            f"{one.kind} 需要 {low} 到 {high} 之间的数字，而不是 {one.value}。",
        )
