"""The processes that import torch, beside `launcher/train.py`: eval, preview, adapters, shape.

`common` holds what they share. Imports `jobs` and what is below it, and the library.
"""
