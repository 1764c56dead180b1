"""Conversations: their tree of branches, where they are kept, how they are written to files and read back. No gradio, no
model."""
