"""A run in, a whole model out: merged in fp32, written in the dtype asked for, reloaded, compared, then published.

merging  base and adapter as one model, and what it has to repeat
writing  the files of the whole model, as transformers and other engines read them
older    what older readers look for in it; earlier folders completed
engines  the commands of what runs it
"""
