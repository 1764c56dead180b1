"""The page. The only package that imports gradio, and only in the modules that build it (page, experts, about, theme)."""
