"""The manual's site: `sphinx-build -W docs build/docs`."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")     # before lstmcore.keras imports Keras

import lstmcore  # noqa: E402

project, release, copyright = "lstmcore", lstmcore.__version__, "2026, lstmcore; MIT license"
extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc", "sphinx.ext.viewcode"]
html_theme, html_title = "furo", f"lstmcore {release}"
exclude_patterns = ["build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"          # shapes and defaults are in the docstrings
numpydoc_show_class_members = False
