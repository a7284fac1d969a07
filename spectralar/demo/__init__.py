"""The demo page: one file a tab, and what tabs share.

May import all of `spectralar`; this is the only place that imports Gradio.
Nothing outside imports from here, but `app.py`.
"""
