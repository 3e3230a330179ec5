"""Rows, examples and batches.

`sources` finds rows, `file_rows`, `json_rows` and `tables` read them; `formats` and `chat` turn a
row into a conversation; `tokenization` into token ids and labels; `dataset` and `cache` keep the
tables of examples, `outcomes` says what became of every row; `sampler` chooses the rows of a step;
`batch` pads or packs them and assigns them to ranks.
Imports `config`, `system`, `errors`.
"""
