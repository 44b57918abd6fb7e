"""Turns in, ids out: what a conversation is and how a family's prompt.py writes it.

Torch is not imported here. In reading order:

turns             what a conversation is, and what is done to one before it is rendered
answer_form       how thought and calls are written in an answer
family            what a prompt.py provides
render            turns to ids by the family's prompt.py, cut to length, labels by part
thinking          whether a model thinks before it answers: read off its chat template, and set in it
through_template  turns with thoughts, tools and calls to ids, through the tokenizer's own chat template
templates         a prompt style as other programs' templates, and compared with them
"""
