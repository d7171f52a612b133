"""The stack and what is done with a whole model: building, generating, saving and loading."""

from seqzoo.models.checkpoint import build_model, load_model, save_model
from seqzoo.models.generation import generate, stream
from seqzoo.models.language_model import LanguageModel

__all__ = ["LanguageModel", "build_model", "generate", "load_model", "save_model", "stream"]
