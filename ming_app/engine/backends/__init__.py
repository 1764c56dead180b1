"""What runs the model, behind the one interface `engine.types.Backend`: ids and a cache in, logits and router rows out.

`torch.py` is the reference (any device); `onnx.py` the fast path on a CPU, with `onnx_spec.py` (what a built engine is),
`onnx_quant.py` (block quantisation), `onnx_graph.py` (the decoder as an ONNX graph) and `onnx_build.py` (building it once).
"""
