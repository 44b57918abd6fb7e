"""Files in, ids and labels out.

In: `--data_path`, files of any common shape. Out: rows of input_ids and labels, every row left out with its reason.
Torch is not imported here. In reading order:

sources        a file's records, each with its line: JSON, JSON lines, CSV, TSV, Parquet, told by content
lines          of these the ones that are read line by line: JSON lines, CSV, TSV
fields         the values of a row as text, lists and utterances, and which keys were read
formats        a record of any known shape as turns
turns          what a conversation is, and what is done to one before it is rendered
defects        kinds of rows that cannot be used, with what is expected and the remedy
conversations  a file's rows as conversations, or unusable for a reason
family         what a prompt.py provides
render         turns to ids by the family's prompt.py, cut to length, labels by part
tokenised      all rows of a file as ids and labels, in a cache under a hash of all that shapes them
dataset        several files mixed, sampled, split; what was read and lost, shown
workers        the processes that tokenise
templates      a prompt style as Jinja and Ollama templates, for other programs
"""
