"""Sphinx: `make docs` builds these pages and the API reference into build/docs."""

import dataclasses
import re

import moe_embed_jax

project = "moe_embed_jax"
author = "moe_embed_jax contributors"
copyright = "moe_embed_jax contributors, Apache-2.0"
version = release = moe_embed_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # so that page.md#some-heading is a link
highlight_language = "none"  # blocks that name no language are commands or output
default_role = "code"  # docstrings put names and expressions in single backticks
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_preserve_defaults = True
napoleon_use_rtype = False  # what stands before the colon of "Returns:" is a name, no type

html_theme = "furo"
html_title = f"moe_embed_jax {version}"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_copy_source = False


def describe_fields(app, what, name, obj, options, lines):
    """Puts "Attributes:" above the paragraphs of a dataclass's docstring that explain its fields.

    Those are the paragraphs of lines `field: text` or `field, field: text`, with their
    continuation lines. Napoleon, which runs after this, makes a list of them.
    """
    if not (dataclasses.is_dataclass(obj) and isinstance(obj, type)):
        return
    fields = {field.name for field in dataclasses.fields(obj)}
    inside = False
    result = []
    for line in lines:
        match = re.match(r"(\w+(?:, \w+)*): ", line)
        starts = match is not None and set(match[1].split(", ")) <= fields
        if starts and not inside:
            result += ["", "Attributes:"]
        inside = starts or (inside and line.startswith("  "))
        result.append(f"  {line}" if inside else line)
    lines[:] = result


def setup(app):
    app.connect("autodoc-process-docstring", describe_fields, priority=100)
