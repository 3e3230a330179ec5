"""Hosts: which there are, what they say of themselves, and what is exported to them.

Imports `options`, `text` and `paths` of the launcher. Torch-free.
"""
