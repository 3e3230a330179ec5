"""Read stored adapters; truncate, combine and inspect them, and merge them into a base.

`adapter_reader.read_adapter` opens any adapter's folder as a `stored_adapter.StoredAdapter`, whose
factors are read a layer at a time, those of experts an expert at a time (`expert_layers`,
`expert_weights`), with `kept_updates` of a run that was re-based. `to_peft.export_adapter`,
`to_vllm.export_for_vllm`, `combine.combine_adapters` and `inspection.inspect_adapter` work on it;
`merge.merge_adapter` (with `merge_plan`, `merge_folder`, `merge_file` and `merge_update`) writes a
whole model. `chat_format` finds the tokenizer and chat template that accompany them.
Imports `init` and what is below it.
"""
