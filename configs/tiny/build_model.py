"""Write configs/tiny/model: the architecture and the tokenizer of the model that learns on two CPU cores.

    python configs/tiny/build_model.py          configs/tiny/model and configs/tiny/scaling/model
    python configs/tiny/build_model.py FOLDER   the former, there

Every printable ASCII character is a token, so that the model has to work on letters and digits; what the
demo's three reasoning-gym tasks say in every prompt, and the brackets of their answers, are one token each,
so that prompts stay short. The model for twelve teachers has the sentences of their twelve tasks too. There are no
weights: the `sft` stage starts from random ones.
"""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|unk|>")

SORT_RULES = """
Please follow the instruction below:
## 1. Let all your answers be a list of numbers. Instead of reporting your answer as \
-69, -13, 1, 7, 11, 43, 59, 61, use ['-69', '-13', '1', '7', '11', '43', '59', '61'] instead
## 2. Convert all numbers in the square brackets as strings. For example, \
['-69', '-13', '1', '7', '11', '43', '59', '61']
"""
PHRASES = (
    "State the final answer to the following arithmetic problem: ",
    " + ",
    " - ",
    " =",
    "Spell this word backward (example: sun -> nus): ",
    "Sort these numbers in ascending order: ",
    "Sort these numbers in descending order: ",
    ".0, ",
    ".0" + SORT_RULES,
    "['",
    ".0', '",
    ".0']",
)

SPIRAL_RULES = """\
Given a matrix, your job is to generate a list of elements in spiral order, starting from the top-left element.

The spiral order is clockwise, starting from the top-left corner. More precisely:
- Start from the top-left corner and move right along the top row.
- Move down along the right column.
- Move left along the bottom row.
- Move up along the left column.
- Repeat the steps for the inner elements of the matrix until every entry is visited.

Hint: Think of peeling the matrix layer by layer from the outside inward. Each layer forms a rectangular frame, \
and you traverse each frame clockwise starting from its top-left corner.

Your output should be a space-separated list of integers, e.g. 1 2 3 4 5 6

For the matrix below, what is the list of elements in spiral order?
"""
ROTATE_RULES = """\
Given a square matrix, your job is to rotate it clockwise.

Your output should be a matrix in the same format as the input.

Rotate the matrix below by """
INSERTION_RULES = """\
Given a string consisting of characters A, B, C, D, and E, your job is to insert a character according to the \
following pattern:
1. If there is a substring ABCD in the string, insert the character A after the substring.
2. If there is a substring BCDE in the string, insert the character B after the substring.
3. If there is a substring CDEA in the string, insert the character C after the substring.
4. If there is a substring DEAB in the string, insert the character D after the substring.
5. If there is a substring EABC in the string, insert the character E after the substring.

Once you have inserted a character, you have to skip over the substring and the inserted character and continue \
the search from the next character.

Your output should be a string that has been modified according to the pattern.

Given the following string, provide the answer after inserting the characters according to the pattern: """
PALINDROME_RULES = """\
Your task is, given a list of letters, to form a valid palindrome.

A palindrome is a phrase that reads the same forwards and backwards.

If there are multiple possible answers, only respond with one of them. You must use all the letters provided.

Your output should be a single string, with no spaces or punctuation.

Now, form a valid palindrome using the following letters: """
WORD_RULES = """\
Your task is to sort words in ascending or descending order using ASCII/Unicode ordering.

Your output should be a comma-separated list of words, e.g. word_1, word_2, word_3

Now, sort these words in """
SCALING_PHRASES = (
    *PHRASES,
    SPIRAL_RULES,
    ROTATE_RULES,
    " degrees clockwise:\n",
    INSERTION_RULES,
    PALINDROME_RULES,
    ", ",
    WORD_RULES,
    "ascending",
    "descending",
    " order (using ASCII/Unicode ordering) and return them as a comma-separated list: ",
    "For the following matrix:\n",
    "\n\nPerform the following series of operations in order:\n- Identity transformation, i.e. no change\n- ",
    "Horizontally mirror the matrix\n",
    "Vertically mirror the matrix\n",
    "Mirror the matrix along the diagonal\n",
    "Mirror the matrix along the counterdiagonal\n",
    "Rotate the matrix ",
    " degrees\n",
    "Remove every 2-nd row (1-indexed)\n",
    "Remove every 2-nd column (1-indexed)\n",
    "Keep all numbers larger than ",
    "Keep all numbers smaller than ",
    "Remove all numbers larger than ",
    "Remove all numbers smaller than ",
    " in this list: ",
    "', '",
    "']",
    "\nReturn the new list in the same format.",
    "Find the Greatest Common Divisor (GCD) of these numbers: ",
    ". Give only the GCD as your final answer.",
    'How many times does the letter "',
    '" appear in the text: "',
    '"?',
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{ raise_exception('unknown role ' + message['role'] + '; use system, user or assistant') }}
{%- endif -%}
{{ '<|' + message['role'] + '|>' + message['content'] }}
{%- if message['role'] == 'assistant' -%}{{ '<|end|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""


def build_tokenizer(phrases: Sequence[str] = PHRASES) -> Tokenizer:
    alphabet = ["\n", *(character for character in map(chr, range(32, 127)))]
    assert set(string.printable) - set("\t\r\x0b\x0c") == set(alphabet)
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    # BPE without merges: one token per character, whatever stands around it.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|unk|>", fuse_unk=False))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer


def build_config(vocab_size: int) -> dict[str, object]:
    """Keys as in the published Qwen3-MoE models, which every release of transformers reads."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": vocab_size,
        "hidden_size": 96,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "initializer_range": 0.08,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": SPECIAL.index("<|end|>"),
        "pad_token_id": SPECIAL.index("<|pad|>"),
        "torch_dtype": "float32",
    }


def build(folder: Path, phrases: Sequence[str] = PHRASES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(phrases)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    end, pad = SPECIAL.index("<|end|>"), SPECIAL.index("<|pad|>")
    files: dict[str, dict[str, object]] = {
        "config.json": build_config(tokenizer.get_vocab_size()),
        "generation_config.json": {
            "do_sample": True,
            "temperature": 1.0,
            "eos_token_id": [end],
            "pad_token_id": pad,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 256,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|end|>",
            "pad_token": "<|pad|>",
            "unk_token": "<|unk|>",
        },
    }
    for name, tree in files.items():
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        build(Path(sys.argv[1]))
    else:
        build(Path(__file__).parent / "model")
        build(Path(__file__).parent / "scaling" / "model", SCALING_PHRASES)
