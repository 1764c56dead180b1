"""Looks of the page: Gradio's theme variables mapped to our own colours (static/page.css).

Fonts are names of fonts a system has, never a web font: nothing is fetched.
"""

from __future__ import annotations

import inspect

import gradio as gr

_VARIABLES = {
    "body_background_fill": "var(--m-bg)",
    "body_text_color": "var(--m-ink)",
    "body_text_color_subdued": "var(--m-muted)",
    "background_fill_primary": "var(--m-surface)",
    "background_fill_secondary": "var(--m-raised)",
    "block_background_fill": "var(--m-surface)",
    "block_border_color": "var(--m-line)",
    "block_info_text_color": "var(--m-muted)",
    "block_label_background_fill": "var(--m-surface)",
    "block_label_text_color": "var(--m-muted)",
    "block_title_text_color": "var(--m-ink)",
    "block_shadow": "none",
    "border_color_primary": "var(--m-line)",
    "border_color_accent": "var(--m-accent)",
    "border_color_accent_subdued": "var(--m-line)",
    "color_accent": "var(--m-accent)",
    "color_accent_soft": "var(--m-accent-soft)",
    "input_background_fill": "var(--m-surface)",
    "input_border_color": "var(--m-line)",
    "input_border_color_focus": "var(--m-accent)",
    "input_placeholder_color": "var(--m-muted)",
    "link_text_color": "var(--m-accent)",
    "link_text_color_hover": "var(--m-accent)",
    "link_text_color_active": "var(--m-accent)",
    "link_text_color_visited": "var(--m-accent)",
    "loader_color": "var(--m-accent)",
    "slider_color": "var(--m-accent)",
    "button_primary_background_fill": "var(--m-accent)",
    "button_primary_background_fill_hover": "var(--m-accent)",
    "button_primary_text_color": "var(--m-accent-ink)",
    "button_primary_text_color_hover": "var(--m-accent-ink)",
    "button_primary_border_color": "var(--m-accent)",
    "button_primary_border_color_hover": "var(--m-accent)",
    "button_secondary_background_fill": "var(--m-surface)",
    "button_secondary_background_fill_hover": "var(--m-raised)",
    "button_secondary_text_color": "var(--m-ink)",
    "button_secondary_text_color_hover": "var(--m-accent)",
    "button_secondary_border_color": "var(--m-line)",
    "button_secondary_border_color_hover": "var(--m-accent)",
    "panel_background_fill": "transparent",
    "table_border_color": "var(--m-line)",
    "table_even_background_fill": "var(--m-surface)",
    "table_odd_background_fill": "var(--m-raised)",
    "code_background_fill": "var(--m-raised)",
    "checkbox_label_text_color": "var(--m-ink)",
    "accordion_text_color": "var(--m-ink)",
}

FONTS = [
    "system-ui",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "sans-serif",
]


def build_theme() -> gr.themes.Base:
    """Gradio's base theme with our variables, the same names in light and dark (page.css gives both their values)."""
    theme = gr.themes.Base(font=FONTS, font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"])
    known = inspect.signature(theme.set).parameters
    values = {}
    for name, value in _VARIABLES.items():
        values.update({n: value for n in (name, f"{name}_dark") if n in known})
    return theme.set(**values)
