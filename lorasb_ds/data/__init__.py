"""Rows, examples and batches.

`sources` and `json_rows` read rows; `formats` and `chat` turn a row into a conversation;
`tokenization` into token ids and labels; `dataset` and `cache` keep the tables of examples;
`sampler` chooses the rows of a step; `batch` pads or packs them and assigns them to ranks.
Imports `config`, `system`, `errors`.
"""
