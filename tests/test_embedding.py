"""Embeddings of texts and prompts equal what one model call per text gives."""

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel, PreTrainedTokenizerFast, T5Config, T5Model

import tiny
from coterie.backbone.loading import Backbone
from coterie.data.batching import PromptFormat, TokenRow
from coterie.data.examples import Example, Message
from coterie.errors import CoterieError
from coterie.experts.bank import ExpertBank
from coterie.features import embedding
from coterie.features.embedding import Encoder, HiddenStateEncoder, SentenceEncoder, load_encoder, user_text
from coterie.routers.base import RouterParts
from coterie.routers.centroid import CentroidRouter, Weighting, boosted_weights
from coterie.routers.feature import growing_text_extractor
from coterie.routers.table import load_router

WORDS = "abcdefghijklmnopqrstuvwxyz"
PAD, CLS, SEP, FIRST_WORD = 0, 1, 2, 4
WINDOW = 12
TEXTS = ["a", "c a b", "z y x w v u t s", "a c b", "q q q q q q"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, [CLS] before and [SEP] after; like MiniLM's own file it also cuts and pads to a length."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    core.enable_truncation(4)
    core.enable_padding(length=9)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


def make_bert() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=FIRST_WORD + len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
    )
    model = BertModel(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_bert().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": WINDOW}))
    return tmp_path


def ask_for_pooling(folder: Path, **config: object) -> Path:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **config}))
    return folder


@torch.no_grad()
def bert_states(text: str) -> torch.Tensor:
    """The last hidden states of [CLS], the letters and [SEP], for one text alone."""
    ids = [CLS, *(FIRST_WORD + WORDS.index(word) for word in text.split()), SEP]
    return make_bert()(input_ids=torch.tensor([ids])).last_hidden_state[0]


@torch.no_grad()
def mean_state(backbone: Backbone, ids: tuple[int, ...], counted: tuple[bool, ...]) -> torch.Tensor:
    """The mean of the base model's last hidden states at the counted positions, scaled, for one row alone."""
    states = backbone.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    kept = [state for state, wanted in zip(states, counted, strict=True) if wanted]
    return normalize(torch.stack(kept).mean(dim=0), dim=0)


def prompt(backbone: Backbone, *contents: str, system: str | None = None, response: str | None = None) -> TokenRow:
    """A conversation of user and assistant in turn."""
    messages = [Message("assistant" if n % 2 else "user", text) for n, text in enumerate(contents)]
    if response is not None:
        messages.append(Message("assistant", response))
    return PromptFormat(backbone.tokenizer, system).row(Example("row", tuple(messages)))


@pytest.fixture(params=["sentences", "hidden"])
def encoder(request, folder, backbone) -> Encoder:
    return load_encoder(str(folder) if request.param == "sentences" else "hidden", backbone)


def test_every_text_gets_one_vector_of_length_one_on_the_cpu(encoder):
    found = encoder(TEXTS)
    assert isinstance(encoder, Encoder)
    assert (found.shape, found.dtype, found.device.type) == ((5, encoder.dimensions), torch.float32, "cpu")
    assert not found.requires_grad
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    assert (found @ found.T).triu(
        diagonal=1
    ).max() < 0.999  # different texts, different vectors; "c a b" is not "a c b"


def test_no_texts_give_no_rows(encoder):
    assert encoder([]).shape == encoder.rows([]).shape == (0, encoder.dimensions)


@pytest.mark.parametrize("size", [1, 2, 32])
def test_a_text_alone_equals_the_text_in_a_batch_whatever_its_size(encoder, size, monkeypatch):
    alone = torch.cat([encoder([text]) for text in TEXTS])
    monkeypatch.setattr(embedding, "BATCH_ROWS", size)
    torch.testing.assert_close(encoder(TEXTS), alone)


def test_a_prompt_alone_equals_the_prompt_in_a_batch(encoder, backbone):
    rows = [prompt(backbone, text) for text in TEXTS]
    torch.testing.assert_close(encoder.rows(rows), torch.cat([encoder.rows([row]) for row in rows]))


def test_a_sentence_is_the_mean_of_its_tokens_whatever_length_its_tokenizer_file_cuts_and_pads_to(folder, backbone):
    found = SentenceEncoder(folder, backbone.tokenizer)(TEXTS)
    torch.testing.assert_close(found, torch.stack([normalize(bert_states(text).mean(0), dim=0) for text in TEXTS]))


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True},
        {"pooling_mode": "cls"},
        {"pooling_mode": ["cls"]},
    ],
)
def test_a_folder_that_asks_for_the_first_token_gets_it(folder, backbone, config):
    found = SentenceEncoder(ask_for_pooling(folder, **config), backbone.tokenizer)(TEXTS)
    torch.testing.assert_close(found, torch.stack([normalize(bert_states(text)[0], dim=0) for text in TEXTS]))


@pytest.mark.parametrize(
    "config",
    [{"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, {"pooling_mode": "mean"}, {}],
)
def test_a_folder_that_asks_for_the_mean_gets_it_in_either_form(folder, backbone, config):
    plain = SentenceEncoder(folder, backbone.tokenizer)(TEXTS)
    assert torch.equal(SentenceEncoder(ask_for_pooling(folder, **config), backbone.tokenizer)(TEXTS), plain)


@pytest.mark.parametrize(
    ("sentences", "tokenizer", "window"), [(7, 9, 7), (9, 7, 7), (30, 25, 20), (None, 15, 15), (None, None, 20)]
)
def test_the_window_is_the_least_that_any_file_allows(folder, backbone, sentences, tokenizer, window):
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": sentences}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["model_max_length"] = tokenizer or 10**30  # what transformers writes where nothing limits it
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert SentenceEncoder(folder, backbone.tokenizer).window == window


def test_a_long_sentence_is_read_from_its_beginning_or_with_tail_at_its_end(folder, backbone):
    letters = list(WORDS)
    room = WINDOW - 2  # [CLS] and [SEP] are always there
    head, tail = (SentenceEncoder(folder, backbone.tokenizer, tail=tail) for tail in (False, True))
    torch.testing.assert_close(head([" ".join(letters)]), head([" ".join(letters[:room])]))
    torch.testing.assert_close(tail([" ".join(letters)]), head([" ".join(letters[-room:])]))
    assert torch.equal(tail(TEXTS), head(TEXTS))


def test_a_long_prompt_is_read_from_its_beginning_or_with_tail_at_its_end(backbone):
    row = prompt(backbone, "question " * 80)
    head, tail = HiddenStateEncoder(backbone), HiddenStateEncoder(backbone, tail=True)
    size = head.window
    assert size == backbone.model.config.max_position_embeddings < len(row.ids)
    torch.testing.assert_close(head.rows([row])[0], mean_state(backbone, row.ids[:size], row.is_user_text[:size]))
    torch.testing.assert_close(tail.rows([row])[0], mean_state(backbone, row.ids[-size:], row.is_user_text[-size:]))


def test_hidden_states_are_averaged_over_the_users_own_tokens(backbone):
    rows = [prompt(backbone, text) for text in TEXTS] + [prompt(backbone, "first", "an answer", "and second")]
    found = HiddenStateEncoder(backbone).rows(rows)
    torch.testing.assert_close(found, torch.stack([mean_state(backbone, row.ids, row.is_user_text) for row in rows]))


def test_an_answer_does_not_change_the_embedding_of_its_prompt(encoder, backbone):
    plain, answered = prompt(backbone, "add 1 2"), prompt(backbone, "add 1 2", response="three")
    torch.testing.assert_close(encoder.rows([answered]), encoder.rows([plain]))


def test_a_text_for_hidden_states_is_read_without_a_template(backbone):
    expected = [mean_state(backbone, tuple(backbone.tokenizer(t)["input_ids"]), (True,) * len(t)) for t in TEXTS]
    torch.testing.assert_close(HiddenStateEncoder(backbone)(TEXTS), torch.stack(expected))


def test_tokens_that_the_tokenizer_adds_are_read_but_not_counted(backbone):
    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    ids = tuple(tokenizer("add 1 2")["input_ids"])
    assert ids[0] == tokenizer.bos_token_id
    found = HiddenStateEncoder(dataclasses.replace(backbone, tokenizer=tokenizer))(["add 1 2"])
    torch.testing.assert_close(found[0], mean_state(backbone, ids, (False, *[True] * (len(ids) - 1))))


def test_a_text_without_tokens_gets_zeros_and_leaves_the_others_alone(backbone):
    hidden = HiddenStateEncoder(backbone)
    found = hidden(["", "add 1 2", ""])
    assert not found[[0, 2]].any()
    torch.testing.assert_close(found[1:2], hidden(["add 1 2"]))
    assert not hidden([""]).any()


def test_a_prompt_without_a_word_of_the_user_gets_zeros(backbone):
    row = prompt(backbone, "")
    assert row.ids and not any(row.is_user_text)
    assert not HiddenStateEncoder(backbone).rows([row]).any()  # a NaN would be something


def test_a_sentence_encoder_reads_what_the_user_wrote_in_a_prompt(folder, backbone):
    sentences = SentenceEncoder(folder, backbone.tokenizer)
    rows = [prompt(backbone, text, system="b b b") for text in TEXTS]
    torch.testing.assert_close(sentences.rows(rows), sentences(TEXTS))


def test_what_the_user_wrote_is_one_line_for_each_turn(backbone):
    row = prompt(backbone, "  wie schön?\nEin Bild 🖼", "an answer", "user", system="user first")
    assert user_text(row, backbone.tokenizer) == "wie schön?\nEin Bild 🖼\nuser"


def test_white_space_that_a_token_brings_along_from_the_template_is_no_part_of_the_text(backbone):
    ids = tuple(backbone.tokenizer("\n two words \n")["input_ids"])
    row = TokenRow(ids, len(ids), (False,) * len(ids), (True,) * len(ids))
    assert user_text(row, backbone.tokenizer) == "two words"


def test_an_encoder_loads_by_the_name_that_it_has(encoder, backbone):
    again = load_encoder(encoder.name, backbone)
    assert (type(again), again.name) == (type(encoder), encoder.name)
    assert torch.equal(again(TEXTS), encoder(TEXTS))


def test_an_alias_stays_the_encoders_name(folder, backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "models").mkdir(parents=True)
    (tmp_path / "cache" / "models" / "minilm").symlink_to(folder)
    found = load_encoder("minilm", backbone)
    assert found.name == "minilm"
    assert torch.equal(found(TEXTS), SentenceEncoder(folder, backbone.tokenizer)(TEXTS))


def test_tail_reaches_the_encoder_that_is_loaded(folder, backbone):
    text = " ".join(WORDS)
    for name in (str(folder), "hidden"):
        head, tail = load_encoder(name, backbone), load_encoder(name, backbone, tail=True)
        assert not torch.allclose(tail([text * 20]), head([text * 20]))


def test_an_encoder_of_the_hub_is_fetched_by_its_id(folder, backbone, monkeypatch):
    asked = []

    def download(source: str, allow_patterns: list[str], revision: str | None) -> str:
        asked.append((source, allow_patterns, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = load_encoder("some-owner/some-encoder", backbone)
    assert found.name == "some-owner/some-encoder"
    assert torch.equal(found(TEXTS), SentenceEncoder(folder, backbone.tokenizer)(TEXTS))
    assert asked == [("some-owner/some-encoder", ["*.json", "*.safetensors", "*.txt", "*.model"], None)]


def test_an_encoder_like_all_mpnet_base_v2_is_the_mean_of_its_states(tmp_path, backbone):
    """ELREA's own sentence encoder is of this architecture; its positions begin behind the padding's number."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MPNetConfig(
        vocab_size=FIRST_WORD + len(WORDS), max_position_embeddings=20, pad_token_id=PAD, bos_token_id=CLS, **size
    )
    model = MPNetModel(config).eval()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    ask_for_pooling(tmp_path, pooling_mode_mean_tokens=True)
    found = load_encoder(str(tmp_path), backbone)(["c a b", "z y x w v"])
    ids = [CLS, *(FIRST_WORD + WORDS.index(word) for word in "cab"), SEP]
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(found[0], normalize(states.mean(dim=0), dim=0))


def test_read_as_published_a_text_moves_the_weights_until_it_fills_what_the_encoder_reads(folder, backbone, tmp_path):
    generator = torch.Generator().manual_seed(0)
    centroids = {name: torch.randn(1, 16, generator=generator) for name in ("one", "two")}
    extractor, _ = growing_text_extractor(str(folder), None, backbone)
    router = CentroidRouter.by_similarity(extractor, centroids, weighting=Weighting(0.5))
    published = router.as_published(backbone)
    room = WINDOW - 2  # [CLS] and [SEP] are always there
    rows = [prompt(backbone, " ".join(WORDS[:count])) for count in (room - 1, room, room + 1, room + 9)]
    found = published.route(rows).weights
    assert torch.equal(found[1], found[2]) and torch.equal(found[1], found[3]) and not torch.equal(found[0], found[1])
    assert not torch.allclose(router.route(rows).weights[2], router.route(rows).weights[3])
    cosines = torch.stack([published.route(rows).similarities[name] for name in centroids], dim=1)
    torch.testing.assert_close(found, boosted_weights(cosines))
    entry = published.save(tmp_path / "router")
    parts = RouterParts(tmp_path / "router", tmp_path, backbone, ExpertBank(("one", "two"), ({}, {})))
    assert torch.equal(load_router(entry, parts).route(rows).weights, found)


@pytest.mark.parametrize("name", ["minilmm", "no/such/folder"])
def test_an_unknown_encoder_is_told_with_the_names_there_are(backbone, name):
    with pytest.raises(CoterieError, match=r"no encoder, local folder or hub id is .*There are: hidden, minilm$"):
        load_encoder(name, backbone)


def needs_a_dense_layer(folder: Path) -> None:
    kinds = ["Transformer", "Pooling", "Dense"]
    modules = [{"path": str(n), "type": f"sentence_transformers.models.{kind}"} for n, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))


def has_pickled_weights_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def is_truncated(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def lacks_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.0.attention.self.query.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def has_a_decoder(folder: Path) -> None:
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5Model(config).save_pretrained(folder)


def brings_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('code of a stranger ran')")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (needs_a_dense_layer, r"needs a module 'Dense', which is not known here"),
        (lambda folder: ask_for_pooling(folder, pooling_mode_lasttoken=True), r"asks for the pooling \['lasttoken'\]"),
        (lambda folder: ask_for_pooling(folder, pooling_mode=["cls", "mean"]), r"asks for the pooling \['cls', 'mean'"),
        (lambda folder: ask_for_pooling(folder, pooling_mode=3), r"asks for the pooling 3"),
        (has_pickled_weights_only, r"cannot be loaded: .*model\.safetensors"),
        (is_truncated, r"cannot be loaded: .*incomplete"),
        (lacks_a_weight, r"cannot be loaded: the weights lack 'encoder\.layer\.0\.attention\.self\.query\.weight'"),
        (has_a_decoder, r"cannot be loaded: t5 has a decoder"),
        (brings_code, r"cannot be loaded: it needs Python code of its own"),
        (lambda folder: (folder / "config.json").unlink(), r"cannot be loaded: "),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"cannot be loaded: "),
        (lambda folder: (folder / "modules.json").write_text("[3]"), r"cannot be loaded: "),
        (lambda folder: (folder / "modules.json").write_text("{"), r"modules.json is not readable JSON"),
    ],
)
def test_a_folder_that_is_no_encoder_for_us_is_told_in_one_line(folder, backbone, spoil, message):
    spoil(folder)
    with pytest.raises(CoterieError, match=message) as caught:
        load_encoder(str(folder), backbone)
    assert "\n" not in str(caught.value)
