"""Token ids in, tokens and router rows out. Knows ids, not chat history on disk, not HTML.

`types.py` holds the contract of the room (imports only numpy); `engine.py` the Engine; `backends/` what runs the model.
"""
