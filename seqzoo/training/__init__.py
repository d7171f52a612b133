"""Lightning training: the module, its optimizer groups and schedule, and what makes a resumed run the same run."""

from seqzoo.training.language_modeling import LanguageModeling
from seqzoo.training.random_state import RandomState

__all__ = ["LanguageModeling", "RandomState"]
