"""Settings: the dataclasses that define them (`config`), and the presets, a YAML file each.

Imports nothing of ours.
"""
