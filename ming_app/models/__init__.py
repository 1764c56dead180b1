"""Which weights, from where, how precise: the catalogue, fetching by content, reading tensors, and what fits the machine.

Knows files and the network, not Gradio and not routing. Everything here except the torch loader runs without torch.
"""
