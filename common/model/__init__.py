"""Weights in, a model that can be trained or asked out.

In: a folder or hub id, and a run's adapter. Out: a transformers model, checked against what its files hold. In reading
order:

folders        whether it is a model's folder at all
weights        its files, looked at before they are loaded
complete       whether they held all its weights, looked at after
loading        tokenizer and base model, plain or quantised
adapter        an adapter attached to its base
verify         what was saved, reopened and compared
layers         its linear layers and parameters, and how they are shown
template_tokens  control tokens a base can hardly tell apart
token_rows     rows of embedding and head that are trained
frozen_layers  cheaper products and gated layers while training; forwards replaced for a while
frozen_head    cross entropy under a head that is not trained, a block of its rows at a time
loss           cross entropy over supervised positions, a chunk of logits at a time
"""
