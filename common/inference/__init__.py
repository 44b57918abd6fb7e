"""Turns in, the text of an answer out: for console, evaluation and service alike.

In reading order:

products       matrix products of a model that only answers
cache          keys and values, with room for more
tuned          a run's folder, opened to answer
prefix_cache   what has been read, kept for prompts that begin alike
answerer       a model that answers conversations, in batches or as a stream
text           ids as whole characters, while they arrive
answer_parts   that text as thought, text and calls
console        the chat of predict.py
remote         the same questions, asked of a server
likelihood     how likely a model finds given answers
"""
