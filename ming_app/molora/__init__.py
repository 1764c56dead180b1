"""MoLoRA, the model's own mathematics: sparse mixtures of LoRA experts around frozen linears (arXiv 2404.09027).

Knows torch (only in layer.py and inject.py), not Gradio, not the files of users except adapters and checkpoints.
"""
