"""Files in, ids and labels out.

In: `--data_path`, files of any common shape. Out: rows of input_ids and labels, every row left out with its reason.
Torch is not imported here. In reading order:

sources   a file's records, each with its line: JSON, JSON lines, CSV, TSV, Parquet, told by content
arrays    the elements of a JSON array, one after the other
formats   a record of any known shape as a conversation, or unusable for a reason
corpora   readers of published corpora that have a shape of their own
utterances  messages as turns, with thoughts, calls and their results
tools     tools on offer and calls, as files write them
fields    the values of a row as text and lists, and which keys were read
defects   kinds of rows that cannot be used, with what is expected and the remedy
dataset   all rows as ids and labels: tokenised once, mixed, sampled, split
cache     where a file's ids and labels are kept
alike     which rows say the same, and where control tokens were typed
accounts  what was read and lost, shown
"""
