"""A run's folder: what training leaves and everything else starts from.

In: a config and the rows to train on. Out: a locked folder, a checkpoint to go on from, and a manifest with which
predict, evaluation, service and export compare base, tokenizer and template. In reading order:

places         whether its files can be read and written, asked before anything is loaded
manifest       what a run was trained on and with
checkpoints    those that are whole
chosen         which of them is asked for, or what the run ended with
adopted        checkpoints and adapters of other tools, which answer as a run does
lineage        what a run takes over from the adapter it starts from
run            start, resume, save, finish
"""
