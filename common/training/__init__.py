"""Rows and a base in, a tuned model with its log, curve and card out.

In reading order:

tuning         what is trained: LoRA and its variants, all weights, the last layers
batches        rows of like length together
packing        several rows in one sequence, blind to each other
memory         what a step takes and what is free
arguments      our knobs in transformers' names
trainer        transformers' Trainer over all this
samples        a few rows answered at each validation
guards         what stops a run that would spoil or train nothing
callbacks      signals, early stopping, whole checkpoints, other processes, the log
curve          the picture of its loss
report         what a run leaves for people
pretrain       how the embedded models are made
"""
