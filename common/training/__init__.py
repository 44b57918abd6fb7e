"""Rows and a base in, a tuned model with its log, curve and card out.

In reading order:

tuning         what is trained: LoRA and its variants, all weights, the last layers
batches        rows of like length together
packing        several rows in one sequence, blind to each other
memory         what a step takes and what is free
trainer        transformers' Trainer over all this
guards         what stops a run that would spoil or train nothing
callbacks      signals, early stopping, whole checkpoints, the log
report         what a run leaves for people
rehearsal      the heaviest steps, tried
check          train.py --check: every row judged
check_report   and what it prints
pretrain       how the embedded models are made
"""
