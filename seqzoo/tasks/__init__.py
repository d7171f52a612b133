"""Synthetic tasks, one a file: a function that draws rows, and a datamodule that trains and scores on them."""

from seqzoo.tasks.mqar import MQARData, Segment

__all__ = ["MQARData", "Segment"]
