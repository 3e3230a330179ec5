"""Layers with a low-rank adapter: LoRA-SB's, LoRA's, and PEFT's own.

- `layer`, `lora_sb`, `lora`: the layers, one per family of methods, and their base class;
  `experts`: that of the experts of an MoE block.
- `inject`: put them into a model, disable and freeze them, list what is trainable.
- `passed_by`: refuse those on layers that the model does not call.
- `low_rank`: computations on `B A` by its factors.
- `peft_config`, `peft_writer`: read and write PEFT's adapter folders.
- `peft_targets`: the fields by which PEFT finds the layers of an adapter.
- `peft_experts`: LoRAs of experts in PEFT's files.
- `peft_method_file`, `peft_methods`: train PEFT's own methods (`--method peft:FILE.json`).

Imports `models`, `runs` and what is below them.
"""
