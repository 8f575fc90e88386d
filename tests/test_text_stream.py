"""Text out: the pieces of a stream are the tokenizer's own decoding, and stop strings end it where they stand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream

import tokenizers_of_kinds
from coterie.engine.text import TextStream

TOKENIZERS = {
    kind: tokenizers_of_kinds.make(kind, special=["<s>", "</s>", "<pad>"], bos_token="<s>", eos_token="</s>")
    for kind in tokenizers_of_kinds.KINDS
}
TEXTS = ["한국어 ok", "four  the\nanswer", " a b ", "naïve 🙂🙃 é", "你好, the thing", "a\ufffdb", "", "   "]

each_kind = pytest.mark.parametrize("kind", TOKENIZERS)
few = settings(max_examples=60, deadline=None)


def streamed(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def encoded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_pieces(tokenizer, ids):
    """The pieces of a text are, together, the tokenizer's own decoding of its tokens."""
    assert "".join(streamed(tokenizer, ids)[0]) == decoded(tokenizer, ids)


@each_kind
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_decoding_of_a_text(kind, text):
    check_pieces(TOKENIZERS[kind], encoded(TOKENIZERS[kind], text))


@each_kind
@few
@given(text=st.text(max_size=20))
def test_the_pieces_are_the_decoding_of_any_unicode(kind, text):
    check_pieces(TOKENIZERS[kind], encoded(TOKENIZERS[kind], text))


@each_kind
@few
@given(data=st.data())
def test_the_pieces_are_the_decoding_of_any_ids(kind, data):
    """Also of bytes that are no characters, of special tokens in between, and of ids that the vocabulary lacks."""
    tokenizer = TOKENIZERS[kind]
    telling = [*encoded(tokenizer, "한 🙂 é  four"), *tokenizer.all_special_ids]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 2) | st.sampled_from(telling), max_size=16))
    check_pieces(tokenizer, ids)


@each_kind
@few
@given(data=st.data())
def test_a_stop_string_ends_the_text_where_it_first_stands(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = encoded(tokenizer, data.draw(st.text("ab \n한é", max_size=20)))
    for special in data.draw(st.lists(st.sampled_from(tokenizer.all_special_ids), max_size=2)):
        ids.insert(data.draw(st.integers(0, len(ids))), special)
    stop = data.draw(st.lists(st.text("ab \n한é", min_size=1, max_size=4), min_size=1, max_size=4))
    pieces, stopped = streamed(tokenizer, ids, stop)
    whole = "".join(pieces)
    shortest = next((n for n in range(len(ids) + 1) if any(s in decoded(tokenizer, ids[:n]) for s in stop)), None)
    assert stopped == (shortest is not None)
    if shortest is None:
        assert whole == decoded(tokenizer, ids)
    else:
        text = decoded(tokenizer, ids[:shortest])
        assert whole == text[: min(text.find(s) for s in stop if s in text)]


@each_kind
def test_the_stop_string_that_is_complete_first_ends_the_text_however_they_overlap(kind):
    tokenizer = TOKENIZERS[kind]
    ids = encoded(tokenizer, "a b한é\nbab")
    for stop, wanted in {
        ("b한é\nb", "한é"): "a b",  # complete first, though another one began before it
        ("한é\nz", "\nba"): "a b한é",  # what one held back, another one ends
        ("é\nbabb", "bbb"): "a b한é\nbab",  # held back to the end, and never complete
    }.items():
        pieces, stopped = streamed(tokenizer, ids, stop)
        assert "".join(pieces) == wanted and stopped == (wanted != "a b한é\nbab")
        assert not any("한é\nbab" in piece for piece in pieces[:-1])


@each_kind
def test_a_stop_string_may_be_a_special_token(kind):
    """Which no text shows, so that the string would never be found."""
    tokenizer = TOKENIZERS[kind]
    ids = [*encoded(tokenizer, "a b"), tokenizer.eos_token_id, *encoded(tokenizer, "ab")]
    pieces, stopped = streamed(tokenizer, ids, ["b ab", "</s>"])
    assert "".join(pieces) == decoded(tokenizer, ids[:-1])[: len("a b")] and stopped
    assert not streamed(tokenizer, ids, ["<pad>"])[1]


def test_text_comes_as_soon_as_no_token_can_change_it():
    tokenizer = TOKENIZERS["byte-fallback"]
    ids = encoded(tokenizer, "four 🙂 the")
    assert streamed(tokenizer, ids)[0] == ["four", " ", "", "", "", "", "🙂 the", ""]


def test_a_tokenizer_that_cleans_spaces_up_gives_its_own_text():
    tokenizer = tokenizers_of_kinds.make("metaspace")
    tokenizer.clean_up_tokenization_spaces = True
    ids = encoded(tokenizer, "the answer is four . no , the ' thing ' is ab 's")
    assert decoded(tokenizer, ids) == "the answer is four. no, the'thing'is ab's"
    check_pieces(tokenizer, ids)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("byte-fallback", ["<0xC3>", "<0xA9>", "<0xFF>"]), ("byte-level", ["a", "Ã"])],
    ids=["bytes that a later one spoils", "an unfinished end"],
)
def test_the_incremental_decoder_of_the_library_would_give_another_text(kind, tokens):
    """Why it is not used; when this fails, it may be."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.convert_tokens_to_ids(tokens)
    stream = DecodeStream(skip_special_tokens=True)
    pieces = []
    for token in ids:
        try:
            pieces.append(stream.step(tokenizer.backend_tokenizer, token) or "")
        except Exception:  # it raises where a text changes
            break
    assert "".join(pieces) != decoded(tokenizer, ids) == "".join(streamed(tokenizer, ids)[0])
