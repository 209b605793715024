"""Makes checkpoint/tokenizer*.json and chat_goldens.json: what transformers makes of a chat.

    python tests/moe_jax/generation/make_chat_goldens.py

Trains a small byte-level BPE tokenizer, and renders checkpoint/chat_template.jinja with it.
Needs transformers (and tokenizers and jinja2, which come with it), and nothing of this project.
"""

import json
import pathlib

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

FOLDER = pathlib.Path(__file__).parent
CHECKPOINT = FOLDER / "checkpoint"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The router sends each token to a few experts, and the experts' weights are what a step reads.",
    "system user assistant tool think tool_call tool_response name arguments city weather",
    "Grüße aus Zürich — 東京の天気は晴れ、気温は二十度です。 😀 👩‍👩‍👧 naïve café",
]

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Temperature & wind of a <city>, in °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
USER = {"role": "user", "content": "How warm is it in 東京? <b>&"}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
THOUGHT = {"role": "assistant", "content": "<think>\nwarm?\n</think>\n\nWarm 😀"}
WARM = {"role": "assistant", "content": "Warm, I "}
THINKS = {"role": "assistant", "content": "Warm."}
TOOL_TURNS = [
    SYSTEM,
    USER,
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "21"},
    {"role": "tool", "content": "22"},
    {"role": "assistant", "content": None, "reasoning_content": "so warm", "tool_calls": None},
]

CASES = {
    "user": {"messages": [USER]},
    "system": {"messages": [SYSTEM, USER]},
    "no generation prompt": {"messages": [USER, THOUGHT], "add_generation_prompt": False},
    "turns": {"messages": [USER, THOUGHT, USER]},
    "no thinking": {"messages": [USER], "enable_thinking": False},
    "thinking": {"messages": [USER], "enable_thinking": True},
    "tools": {"messages": TOOL_TURNS, "tools": [TOOL, TOOL], "add_generation_prompt": False},
    "tools, no system": {"messages": [USER], "tools": [TOOL]},
    "reasoning": {"messages": [USER, THINKS | {"reasoning": "warm?"}]},
    "thinking field": {"messages": [USER, THINKS | {"thinking": "warm?", "reasoning": "cold?"}]},
    "reasoning_content": {
        "messages": [USER, THINKS | {"reasoning": "a", "thinking": "b", "reasoning_content": "c"}]
    },
    "continue": {"messages": [USER, WARM], "continue_final_message": True},
    "continue thinking": {
        "messages": [USER, THINKS | {"reasoning": "is it\nwarm "}],
        "continue_final_message": "reasoning",
    },
    "continue the user": {"messages": [SYSTEM, USER], "continue_final_message": "content"},
    "blocks": {"messages": [USER], "pretty": {"b": {"z": 1, "a": ["ü", None]}, "a": True}},
    "special tokens": {"messages": [USER], "show_eos": 1},
}
TEXTS = ["", " a", "The token's", "東京 😀\n\n  x", "a<|im_end|>b", "unknown: ☃"]


def trained() -> tokenizers.Tokenizer:
    """Byte-level BPE with the special tokens last, as Qwen's is."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(SPECIAL)
    return backend


def main() -> None:
    """Writes the files beside this script."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained(), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (CHECKPOINT / "chat_template.jinja").read_text()
    tokenizer.backend_tokenizer.save(str(CHECKPOINT / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}
    (CHECKPOINT / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    chats = []
    for name, case in CASES.items():
        options = {"add_generation_prompt": "continue_final_message" not in case, **case}
        text = tokenizer.apply_chat_template(options.pop("messages"), tokenize=False, **options)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        chats.append({"name": name, "arguments": case, "text": text, "ids": ids})
    texts = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        texts.append(
            {
                "text": text,
                "ids": ids,
                "decoded": tokenizer.decode(ids),
                "decoded_without_special": tokenizer.decode(ids, skip_special_tokens=True),
            }
        )
    versions = {
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    goldens = {"versions": versions, "chats": chats, "texts": texts}
    text = json.dumps(goldens, indent=1, ensure_ascii=False)
    (FOLDER / "chat_goldens.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
