"""Rows, examples and batches.

`given_rows` writes those of a program to a file; `sources` finds rows, `file_rows`, `json_rows` and
`tables` read them; `formats` finds what a row says, a conversation (`turns`) or text; `chat` makes
it a text, by the chat template (`template`) or with what it has of one already (`marks`);
`tokenization` makes token ids and labels; `labelled_rows` reads rows that have a label instead,
`classification` makes examples and classes of them; `dataset` and `cache` keep the tables of
examples, `outcomes` says what became of every row, and `notes` what is not learned of those kept;
`first_rows` looks at some without a tokenizer; `run_rows` are those of a run. `sampler` chooses the
rows of a step; `batch` pads or packs them and assigns them to ranks.
Imports `config`, `system`, `errors`.
"""
