"""A tokenizer of single bytes with the chat template's tokens, and a tiny random model that speaks it, as a folder."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from psysafe.data.tokenizer import END_OF_TEXT, IM_END, IM_START, THINK, THINK_END
from tests.oracles import reference_model, write_checkpoint

SPECIAL, MARKUP = (END_OF_TEXT, IM_START, IM_END), (THINK, THINK_END)
VOCAB = 256 + len(SPECIAL) + len(MARKUP)


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP])
    assert backend.get_vocab_size() == VOCAB
    return backend


def write_text_model(folder: Path, name: str = "published pattern", seed: int = 0, **changes) -> Path:
    write_checkpoint(reference_model(name, seed, vocab_size=VOCAB, **changes), folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    eos = [byte_tokenizer().token_to_id(text) for text in (IM_END, END_OF_TEXT)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder
