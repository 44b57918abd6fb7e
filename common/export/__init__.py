"""What leaves the project: a run as one whole model, proved to answer as the run does. In: a finished run.

proof        how the run answers (logits and greedy ids of eight prompts), and whether another model does
merging      the adapter added to the base's weights
folder       the place, what is written there, reloaded and compared before it is put in place
older        what readers older than transformers 5 need beside that: rope keys, template, tokenizer.model
gguf_tokenizer  the tokenizer as llama.cpp reads one
gguf_tensors  the weights as llama.cpp's tensors, and back
gguf_file    a whole model as one GGUF file
gguf_adapter  the adapter alone
llama_cpp    that file asked in llama.cpp itself, where it is installed
engines      which engines run it, by which commands
verify       --verify: an engine or a server asked, and compared with the run
repair       --repair: an earlier export given what `older` names
"""
