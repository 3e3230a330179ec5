"""Many runs side by side: `lorasb compare`.

Imports `jobs` and what is below it. Torch-free.
"""
