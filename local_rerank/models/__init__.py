"""Several models in one process: which there are, what memory they need, and when they are loaded and unloaded.

options.py      the models of a server: texts of --model and sections of a configuration file -> ModelOptions
room.py         bytes that a model needs, and bytes that are free in RAM and on a GPU
served.py       ServedModel: a model's name, its state, and the loaded Reranker while there is one
model_set.py    ModelSet: loads a model at its first request, and unloads models that are idle or in the way
"""
