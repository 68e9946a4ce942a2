"""Host memory and seconds of 7B and 13B on many GPUs, by arithmetic: formulas that the page prints with their values.

M is the number of parameters, P of those that train, S = 12 P the bytes of a state (fp32 weight and two moments), R the
ranks, G the GPUs of a node; L is a decoder layer's parameters, T those of the largest tensor.
"""

from typing import Any, NamedTuple

from benchmarks.at_scale.models import Made
from llava import sizes

GB = 1e9
MODELS = {
    "7B": sizes.Sizes(sizes.CLIP_L14_336, sizes.VICUNA_7B),
    "13B": sizes.Sizes(sizes.CLIP_L14_336, sizes.VICUNA_13B),
}
RANKS = (8, 64)
FORMULAS = {
    ("save, rank", "before"): "S on rank 0, 0 on the others",
    ("save, rank", "after"): "S / R",
    ("save, node", "before"): "S on rank 0's node",
    ("save, node", "after"): "G S / R",
    (
        "start, rank",
        "before",
    ): "0 where the file has the precision of training: it is mapped; else 2 M, shown here",
    ("start, rank", "after"): "0; it reads from the mapped file, a tensor at a time",
    (
        "start, node",
        "before",
    ): "2 M of mapped file, shared, which the system can drop; else G 2 M, shown here",
    ("start, node", "after"): "2 M of mapped file, shared, which the system can drop",
    ("export, rank", "before"): "max(S, 4 P + 4 M) on rank 0, 0 on the others",
    ("export, rank", "after"): "2 L + 12 T + W(R)",
    ("export, node", "before"): "the same, on rank 0's node",
    ("export, node", "after"): "G times as much",
    ("save, held", "before"): "S / link + S / host",
    ("save, held", "after"): "S / R / host",
    ("save, committed", "before"): "held + S / disk (a local copy) + S / network",
    ("save, committed", "after"): "held + G S / R / disk + S / R / sha + G S / R / network",
}
"""What the page prints beside each figure; `row` computes just this."""


class Rates(NamedTuple):
    """GB a second."""

    disk: float
    """Of a node."""
    network: float
    """Between a node and the store."""
    host: float
    """From a GPU to its host."""
    link: float
    """That a rank gathers from the other GPUs."""
    sha: float
    """That one core hashes; measured."""
    per_node: int
    """GPUs."""


def table(rates: Rates) -> list[dict[str, Any]]:
    """A row for each model and number of ranks."""
    return [row(name, ranks, rates) for name in MODELS for ranks in RANKS]


def row(name: str, ranks: int, rates: Rates) -> dict[str, Any]:
    """Each figure of `FORMULAS`: bytes, or seconds of a save."""
    model = MODELS[name]
    whole, trains = model.parameters, model.trainable("full")
    language = model.language
    layer = language.layer_weights
    largest = max(language.vocabulary * language.hidden, *(a * b for a, b in language.linear))
    state, on_node = 12 * trains, min(ranks, rates.per_node)
    share, thin = state / ranks, 2 * layer + 12 * largest + windows(ranks)
    exported = max(state, 4 * trains + 4 * whole)
    held = {"before": state / GB / rates.link + state / GB / rates.host, "after": share / GB / rates.host}
    node = on_node * share / GB
    committed = {
        "before": held["before"] + state / GB / rates.disk + state / GB / rates.network,
        "after": held["after"] + node / rates.disk + share / GB / rates.sha + node / rates.network,
    }
    figures: dict[str, dict[str, float]] = {
        "save, rank": {"before": state, "after": share},
        "save, node": {"before": state, "after": on_node * share},
        "start, rank": {"before": 2 * whole, "after": 0},
        "start, node": {"before": 2 * whole * on_node, "after": 2 * whole},
        "export, rank": {"before": exported, "after": thin},
        "export, node": {"before": exported, "after": on_node * thin},
        "save, held": held,
        "save, committed": committed,
    }
    return {"model": name, "ranks": ranks, "parameters": whole, "trainable": trains, "figures": figures}


def windows(ranks: int) -> float:
    """W(R): bytes read ahead of the files of R ranks: of the k-th 128 MiB / k, but 1 to 8 MiB."""
    return float(sum(min(8 << 20, max(1 << 20, (128 << 20) // number)) for number in range(1, ranks + 1)))


def checked(summary: list[dict[str, Any]], made: Made) -> list[dict[str, Any]]:
    """The formulas for a rank's memory against what was measured here, at the most ranks."""
    found = []
    most = max(row["ranks"] for row in summary)
    for row in (row for row in summary if row["ranks"] == most):
        state, side = 12 * made.trainable, row["side"]
        thin = 2 * made.layer + 12 * made.largest + windows(most)
        wanted = {
            "save": state if side == "before" else state / most,
            "export": max(state, 4 * made.trainable + 4 * made.parameters) if side == "before" else thin,
        }
        found += [
            {
                "side": side,
                "zero": row["zero"],
                "ranks": most,
                "what": what,
                "formula": expected,
                "measured": row[what]["anonymous_max"],
            }
            for what, expected in wanted.items()
        ]
    return found
