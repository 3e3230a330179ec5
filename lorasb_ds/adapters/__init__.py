"""Low-rank layers of every kind: LoRA-SB's, LoRA's, PEFT's own.

`lora_sb` and `lora` are the layers, `inject` puts them into a model, `low_rank` computes with
factors, `peft_config`, `peft_methods` and `peft_writer` are about PEFT's classes and files.
Imports `models`, `runs` and what is below them.
"""
