"""What runs the model, behind `engine.types.Backend`.

`torch.py` is the reference (any device); `native/` the fast engine on a CPU.
"""
