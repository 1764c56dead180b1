"""RouterTrace in; tables, and the compact payload the page draws from, out. Pure functions: numpy only, no gradio, no model."""
