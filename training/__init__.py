"""Training of sparse MoLoRA adapters: data and mix, recipe, loss, trainer, evaluation, export.

Imports `ming_app.molora` and `ming_app.models`, never the other way round. `import training` is light: torch and
transformers load where they are used.
"""
