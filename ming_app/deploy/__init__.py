"""Bringing the app to where others can reach it: the folder of a Hugging Face Space, and its upload."""
