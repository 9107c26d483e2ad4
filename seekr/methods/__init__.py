"""The methods, by the name that a stream's YAML gives. Adding one is a file and a line here."""

from __future__ import annotations

from seekr.methods.contract import Method, Needs, Outputs, Term, Terms
from seekr.methods.derpp import DERpp
from seekr.methods.ewc import EWC
from seekr.methods.l2p import L2P
from seekr.methods.lwf import LwF
from seekr.methods.mtl import MTL
from seekr.methods.olora import OLoRA
from seekr.methods.opr import OPR
from seekr.methods.pp import ProgressivePrompts
from seekr.methods.recadam import RecAdam
from seekr.methods.replay import Replay
from seekr.methods.rho1 import RHO1
from seekr.methods.sapt import SAPT
from seekr.methods.seekr import SEEKR
from seekr.methods.seqft import SeqFT

METHODS: dict[str, type[Method]] = {
    "seqft": SeqFT,
    "mtl": MTL,
    "replay": Replay,
    "derpp": DERpp,
    "lwf": LwF,
    "ewc": EWC,
    "recadam": RecAdam,
    "olora": OLoRA,
    "opr": OPR,
    "l2p": L2P,
    "pp": ProgressivePrompts,
    "rho1": RHO1,
    "sapt": SAPT,
    "seekr": SEEKR,
}

__all__ = [
    "EWC",
    "L2P",
    "METHODS",
    "MTL",
    "OPR",
    "RHO1",
    "SAPT",
    "SEEKR",
    "DERpp",
    "LwF",
    "Method",
    "Needs",
    "OLoRA",
    "Outputs",
    "ProgressivePrompts",
    "RecAdam",
    "Replay",
    "SeqFT",
    "Term",
    "Terms",
]
