"""Other engines, each asked about a folder of safetensors in a process of its own. In: prompts of ids. Out: its ids.

asking       which engines, by which packages; the process, and what it found
engine_child  that process: loads the folder in an engine, in float32, and answers
llama_server  llama.cpp with a GGUF file, in a process of its own
"""
