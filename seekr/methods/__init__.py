"""The methods, by the name that a stream's YAML gives. Adding one is a file and a line here."""

from __future__ import annotations

from seekr.methods.contract import Method, Needs, Outputs, Term, Terms
from seekr.methods.derpp import DERpp
from seekr.methods.mtl import MTL
from seekr.methods.replay import Replay
from seekr.methods.seekr import SEEKR
from seekr.methods.seqft import SeqFT

METHODS: dict[str, type[Method]] = {
    "seqft": SeqFT,
    "mtl": MTL,
    "replay": Replay,
    "derpp": DERpp,
    "seekr": SEEKR,
}

__all__ = [
    "METHODS",
    "MTL",
    "SEEKR",
    "DERpp",
    "Method",
    "Needs",
    "Outputs",
    "Replay",
    "SeqFT",
    "Term",
    "Terms",
]
