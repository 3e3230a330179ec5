"""The base's tokenizer: read from the files its folder has, with a pad token chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasb_ds.config.chat_templates import TEMPLATES, read_chat_template
from lorasb_ds.data.marks import marks_of
from lorasb_ds.data.template import render
from lorasb_ds.data.turns import RowError
from lorasb_ds.errors import ConfigError
from lorasb_ds.models.checkpoint_files import first_line

# transformers' classes for a tokenizer.model alone. All of them begin a text with the
# beginning-of-sequence token.
SENTENCEPIECE_CLASSES = {
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "mixtral": "LlamaTokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
}

# Tokens reserved for padding, though not every tokenizer_config.json says so: Gemma's; BERT's,
# which many fine-tuned models use; Falcon 3's; Llama 3's; Qwen's and Phi's.
PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|endoftext|>")

# Spaces at both ends and inside, digits, line ends, characters that become bytes, and characters
# that normalization would change.
PROBE = "  Say 12345:\n\n\tx = f(y)   # größer, 漢字, 🙂 ﬁn² "


def read_tokenizer(
    model: str,
    folder: Path,
    hf_config: Any,
    trust_remote_code: bool = False,
    *,
    needs_end: bool = True,
) -> Any:
    """Read the base's tokenizer, padding on the right, as its files define it.

    Args:
        model: as --model gives it, for messages.
        folder: the folder with the files.
        hf_config: the model's configuration.
        trust_remote_code: whether the base may bring its own tokenizer class.
        needs_end: refuse one without an end-of-sequence token, as BERT's, which cannot end answers.
    Raises:
        ConfigError: if it cannot be read, has no end-of-sequence token, or one that the model
            does not know; or several chat templates and no default.
    """
    only_sentencepiece = (folder / "tokenizer.model").is_file() and not (
        folder / "tokenizer.json"
    ).is_file()
    if only_sentencepiece and not trust_remote_code:  # else the base may bring its own class
        tokenizer = _read_sentencepiece(model, folder, hf_config.model_type)
    else:
        tokenizer = _read_by_transformers(model, folder, trust_remote_code)
    vocab_size = hf_config.get_text_config().vocab_size
    if tokenizer.eos_token_id is None and needs_end:
        raise ConfigError(f"--model {model}: its tokenizer has no end-of-sequence token.")
    if (tokenizer.eos_token_id or 0) >= vocab_size:
        raise ConfigError(
            f"--model {model}: the tokenizer's end-of-sequence token {tokenizer.eos_token} is "
            f"number {tokenizer.eos_token_id}, but the model's vocabulary has {vocab_size} tokens. "
            "The tokenizer is another model's: fetch its files again."
        )
    tokenizer.padding_side = "right"
    return tokenizer


def use_chat_template(tokenizer: Any, chosen: str) -> None:
    """Give the tokenizer the template of ``--chat-template`` in place of its own.

    Raises:
        ConfigError: if it cannot be rendered, or ends turns by what is no token of this tokenizer:
            answers would not end there.
    """
    tokenizer.chat_template = read_chat_template(chosen)
    tokenizer.template_name = chosen
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "."}]
    try:
        render(tokenizer, turns)
        render(tokenizer, turns[:1], add_generation_prompt=True)
    except RowError as error:
        raise ConfigError(f"--chat-template {chosen}: a question and an answer: {error}.") from None
    end = marks_of(tokenizer).end
    if end and str(tokenizer.eos_token) not in end:
        pieces = tokenizer(end, add_special_tokens=False)["input_ids"]
        if len(pieces) > 1:
            raise ConfigError(
                f"--chat-template {chosen} ends turns by {end!r}, which is {len(pieces)} tokens of "
                "this model's tokenizer: answers would not end there. Take a template that ends "
                f"turns by {tokenizer.eos_token}, or by another token that the tokenizer has: "
                f"{', '.join(TEMPLATES)} have names."
            )


def choose_pad_token(tokenizer: Any, vocab_size: int) -> str | None:
    """Give the tokenizer a pad token that the model has an embedding for, if it has none.

    It is the tokenizer's own, or a token reserved for padding, the unknown token, or the end of
    sequence: no embedding is added. Padding is masked by its position, so it never gives labels.

    Args:
        vocab_size: the model's; ids from there on have no embedding.
    Returns:
        What was chosen and why, for the user; None if the tokenizer's own token is used.
    """
    own, own_id = tokenizer.pad_token, tokenizer.pad_token_id
    if own_id is not None and own_id < vocab_size:
        return None
    vocabulary = tokenizer.get_vocab()
    wanted = (*PAD_TOKENS, tokenizer.unk_token, tokenizer.eos_token)
    chosen = next(token for token in wanted if vocabulary.get(token, vocab_size) < vocab_size)
    tokenizer.pad_token = chosen
    reason = "has no pad token" if own_id is None else f"pads with {own}, unknown to the model"
    return f"the tokenizer {reason}: padding with {chosen} (masked, so it is not trained on)"


def _read_by_transformers(model: str, folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        tokenizer("")  # some settings are looked at only now
        return tokenizer
    except Exception as error:  # the package tokenizers has no other class of its own
        raise ConfigError(
            f"--model {model}: its tokenizer cannot be read: {first_line(error)} "
            "The folder needs tokenizer.json (or a sentencepiece tokenizer.model)."
        ) from error


def _read_sentencepiece(model: str, folder: Path, model_type: str) -> Any:
    """Make a tokenizer from a sentencepiece file alone, and check it against sentencepiece itself.

    AutoTokenizer (transformers 5.23) reads such a folder without an error, but leaves out the
    beginning of sequence, and for Llama and Mistral the space before a text's first word.
    """
    import transformers
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    from tokenizers import normalizers
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    remedy = (
        "Put a tokenizer.json beside it: the model's publisher may have one, and save_pretrained "
        "of a tokenizer that works writes one."
    )
    if model_type not in SENTENCEPIECE_CLASSES:
        raise ConfigError(
            f"--model {model}: there is no tokenizer.json, and how a {model_type} model uses "
            f"tokenizer.model is not known (it is for {', '.join(SENTENCEPIECE_CLASSES)}). {remedy}"
        )
    try:
        sentencepiece = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"--model {model}: tokenizer.model is no sentencepiece model (Llama 3's, for one, is "
            f"tiktoken's): {first_line(error)} {remedy}"
        ) from error
    says_bos = "add_bos_token" in get_tokenizer_config(folder)
    tokenizer = getattr(transformers, SENTENCEPIECE_CLASSES[model_type]).from_pretrained(
        folder, **({} if says_bos else {"add_bos_token": True})
    )
    # As in sentencepiece; the class adds no space to a text that begins with one.
    spec: Any = sentencepiece_model_pb2
    spec = spec.ModelProto.FromString(sentencepiece.serialized_model_proto())
    prefix = [normalizers.Prepend("▁")] if spec.normalizer_spec.add_dummy_prefix else []
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [*prefix, normalizers.Replace(" ", "▁")]
    )
    tokenizer.backend_tokenizer.pre_tokenizer = None
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    same_ids = ids == sentencepiece.encode(PROBE)
    is_bpe = spec.trainer_spec.model_type == spec.trainer_spec.BPE
    if not (is_bpe and same_ids and tokenizer.decode(ids) == sentencepiece.decode(ids)):
        raise ConfigError(
            f"--model {model}: tokenizer.model, read as a {SENTENCEPIECE_CLASSES[model_type]}, "
            f"does not give the tokens that sentencepiece gives. {remedy}"
        )
    return tokenizer
