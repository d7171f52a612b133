"""Training data: text as bytes, and the numbered batches that every datamodule here is made of."""

from seqzoo.data.batches import Batch, TrainingLoader, batch_numbers, fixed_loader, numbered_generator
from seqzoo.data.text import TextData

__all__ = ["Batch", "TextData", "TrainingLoader", "batch_numbers", "fixed_loader", "numbered_generator"]
