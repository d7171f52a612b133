"""Efficient sequence models: every mixer is ``y, state = mixer(x, state, starts)``, and one stack takes them all."""

from seqzoo import kernels, layers
from seqzoo.mixer import (
    Mixer,
    clone_state,
    detach_state,
    measure_state,
    starts_from_cu_seqlens,
)
from seqzoo.models import LanguageModel, build_model, generate, load_model, save_model, stream

__version__ = "0.1.0"

__all__ = [
    "LanguageModel",
    "Mixer",
    "build_model",
    "clone_state",
    "detach_state",
    "generate",
    "kernels",
    "layers",
    "load_model",
    "measure_state",
    "save_model",
    "starts_from_cu_seqlens",
    "stream",
]
