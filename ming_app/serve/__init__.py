"""The page and an OpenAI-compatible HTTP API in one server: `python -m ming_app serve`.

app.py puts both together, server.py runs them, api.py answers, guard.py decides who may ask and how much they may send.
"""
