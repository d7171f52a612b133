"""Evaluations: the loss far beyond the training length, and how much of what was read can be recalled."""
