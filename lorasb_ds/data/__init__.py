"""From rows to batches.

`sources` and `json_rows` read rows; `formats` and `chat` turn a row into a conversation;
`tokenization` into token ids and labels; `dataset` and `cache` keep the tables of examples;
`sampler` decides which rows a step sees; `batch` pads, packs and deals them out to ranks.
Imports `config`, `system`, `errors`.
"""
