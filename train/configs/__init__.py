"""Settings: the dataclasses that define them (`config`), presets, a YAML file each, and what reads them (`reading`).

Imports nothing of ours.
"""
