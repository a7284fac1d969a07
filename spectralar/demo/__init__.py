"""The demo page (Gradio): one file a tab, one component for everything that is scrubbed."""
