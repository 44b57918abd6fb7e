"""Requests in, tokens out: many answers share each forward pass. Knows nothing of HTTP.

In reading order:

request         what is asked, and the parts of its answers as they come
prompt_encoder  conversations and texts as prompt ids, ids as tokens
group           what goes on under one name, and which prompts are read next
batcher         the thread that owns the model: rows join and leave between two steps
kv_batch        rows that share forward passes, and their cache
replay          their steps, recorded
switch          the net, set to an adapter, and its replay
sampling        the next id of each row
beam_search     beams that take turns with the others
"""
