"""Text piece by piece: equal to decoding at once, and never half a character."""

import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.generation.text import IncrementalDecoder, RowText
from moe_jax.tokenization import ByteTokenizer, load_tokenizer

BYTES = ByteTokenizer(256)
BPE = load_tokenizer(pathlib.Path(__file__).with_name("checkpoint"))


def pieces(decode, ids):
    decoder = IncrementalDecoder(decode)
    return [*(decoder.push(id_) for id_ in ids), decoder.flush()]


def test_a_character_of_several_tokens_comes_whole():
    assert pieces(BYTES.decode, BYTES.encode("a€😀b")) == (
        ["a", "", "", "€", "", "", "", "😀", "b", ""]
    )


def test_what_never_becomes_a_character_is_replaced_at_the_end():
    assert pieces(BYTES.decode, [0x61, 0xF0, 0x9F]) == ["a", "", "", "�"]


@settings(deadline=None)
@given(st.text(max_size=30))
@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_any_text(tokenizer, text):
    made = pieces(tokenizer.decode, tokenizer.encode(text))
    assert "".join(made) == tokenizer.decode(tokenizer.encode(text))
    if "�" not in text:
        assert not any("�" in piece for piece in made)


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), max_size=120))
@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_any_tokens(tokenizer, ids):
    assert "".join(pieces(tokenizer.decode, ids)) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([0x80, 0xC3, 0xE2, 0x82, 0xAC, 0xF0, 0xFF]), max_size=300))
def test_bytes_that_are_hardly_ever_characters(ids):
    assert "".join(pieces(BYTES.decode, ids)) == BYTES.decode(ids)


def test_few_tokens_are_decoded_at_a_time():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return BYTES.decode(ids)

    pieces(decode, [0xFF] * 500 + [0x61] * 500)
    assert longest < 100


def test_a_decoder_that_drops_the_first_space():
    # as those of SentencePiece's kind do: a word's space belongs to it, but not at the start
    words = ["▁one", "▁two", "s", "▁three"]

    def decode(ids):
        return "".join(words[id_] for id_ in ids).replace("▁", " ").removeprefix(" ")

    assert pieces(decode, [0, 1, 2, 3]) == ["one", " two", "s", " three", ""]


def test_special_tokens_have_no_text():
    end = BPE.special_ids["eos_token"]
    ids = [*BPE.encode("a"), end, *BPE.encode(" b")]
    assert "".join(pieces(BPE.decode, ids)) == "a b"


def test_stop_string_across_tokens_and_characters():
    row = RowText(BYTES, ["€!"])
    made = [row.push(id_) for id_ in BYTES.encode("a€!")]
    assert made == [("a", False), ("", False), ("", False), ("", False), ("", True)]
    row = RowText(BYTES, ["€!"])
    assert "".join(row.push(id_)[0] for id_ in BYTES.encode("a€?€")) == "a€?"
    assert row.flush() == "€"


@pytest.mark.parametrize(
    ("stop", "shown", "stops_at"),
    [
        ("<|im_end|>", "ok", "<|im_end|>"),
        ("im_e", "ok", "<|im_end|>"),  # as transformers: a part of a token is enough
        ("k<|im_end|>", "o", "<|im_end|>"),  # "k" is held back until the token comes
        ("<|im_end|>\n", "ok", "\n"),
        ("<|im_end|>\n<|im_start|>", "ok", "<|im_start|>"),
        ("ok\n", None, None),  # between "ok" and the line break there is a token
        ("never", None, None),
    ],
)
def test_a_stop_string_matches_special_tokens(stop, shown, stops_at):
    row, made = RowText(BPE, [stop]), ""
    for id_ in BPE.encode("ok<|im_end|>\n<|im_start|>user"):
        text, stopped = row.push(id_)
        made += text
        if stopped:
            assert (made, BPE.decode([id_], skip_special_tokens=False)) == (shown, stops_at)
            return
    assert (made + row.flush(), None) == ("ok\nuser", stops_at)


def test_a_special_token_ends_a_character_that_is_incomplete():
    end = BPE.special_ids["eos_token"]
    half = BPE.encode("☃")[:1]
    row = RowText(BPE, ["<|im_end|>"])
    assert [row.push(id_) for id_ in [*BPE.encode("a"), *half, end]] == [
        ("a", False),
        ("", False),
        ("�", True),
    ]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([*BPE.encode("a b"), *BPE.special_ids.values()]), max_size=20))
def test_stop_strings_that_never_come_change_no_text(ids):
    row = RowText(BPE, ["never", "<|im_start|>x"])
    made = "".join(row.push(id_)[0] for id_ in ids) + row.flush()
    assert made == BPE.decode(ids)


def test_without_tokenizer_there_is_no_text():
    row = RowText(None, [])
    assert row.push(5) == ("", False)
    assert row.flush() == ""
