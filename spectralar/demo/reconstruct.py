"""The Reconstruct tab."""
TITLE = "Reconstruct"
def build(model):
    return []
