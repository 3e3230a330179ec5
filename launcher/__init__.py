"""What the user types: the `lorasb` command and the worker that DeepSpeed starts."""
