"""Turns in, ids out: what a conversation is and how a family's prompt.py writes it.

Torch is not imported here. In reading order:

turns        what a conversation is, and what is done to one before it is rendered
answer_form  how thought and calls are written in an answer
family       what a prompt.py provides
render       turns to ids by the family's prompt.py, cut to length, labels by part
templates    a prompt style as other programs' templates, and compared with them
"""
