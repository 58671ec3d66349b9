"""The text encoder at toy size: against a slow twin, through a file, alone and in a batch, and on too long prompts."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from foveate.conditioning.minilm import (
    TOKENIZER_NAME,
    WEIGHTS_NAME,
    MiniLM,
    MiniLMConfig,
    TextEncoder,
    dequantise_rows,
    mean_pool,
    quantise_rows,
)
from foveate.core.errors import CheckpointError, FoveateError
from foveate.core.layers import init_weights

WORDS = "[PAD] [UNK] [CLS] [SEP] a red green blue cat dog apple on left right of big small two the house"
CONFIG = MiniLMConfig(vocab_size=64, max_positions=64, width=24, num_heads=3, num_blocks=2, hidden_width=48)
PROMPTS = ["a red cat", "", "two big dogs on the left of a house", "apple"]


def make_tokenizer() -> Tokenizer:
    vocab = {word: index for index, word in enumerate([*WORDS.split(), "##s"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    # As in the published file, which would change the features in silence.
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    return tokenizer


def make_model() -> MiniLM:
    torch.manual_seed(7)
    model = MiniLM(CONFIG)
    init_weights(model)
    for parameter in model.parameters():
        # Biases and norms away from 0 and 1, so that leaving one out shows.
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture
def encoder() -> TextEncoder:
    return TextEncoder(model=make_model(), tokenizer=make_tokenizer(), max_tokens=12)


def slow_norm(x_E: Tensor, weight_E: Tensor, bias_E: Tensor) -> Tensor:
    centred_E = x_E - x_E.mean()
    return centred_E / torch.sqrt((centred_E**2).mean() + 1e-12) * weight_E + bias_E


def slow_features(weights: dict[str, Tensor], ids: list[int]) -> Tensor:
    """The encoder written out in float64, one token and one head at a time, from the published parameter names."""

    def dense(name: str, x_E: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ x_E + weights[f"{name}.bias"]

    def norm(name: str, x_E: Tensor) -> Tensor:
        return slow_norm(x_E, weights[f"{name}.weight"], weights[f"{name}.bias"])

    tables = [weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")]
    xs = [norm("embeddings.LayerNorm", tables[0][id_] + tables[1][t] + tables[2][0]) for t, id_ in enumerate(ids)]
    head_width = CONFIG.width // CONFIG.num_heads
    for index in range(CONFIG.num_blocks):
        block = f"encoder.layer.{index}"
        q, k, v = ([dense(f"{block}.attention.self.{n}", x) for x in xs] for n in ("query", "key", "value"))
        attended = []
        for t in range(len(ids)):
            heads = []
            for head in range(CONFIG.num_heads):
                part = slice(head * head_width, (head + 1) * head_width)
                shares = [math.exp(float(q[t][part] @ k_s[part]) / math.sqrt(head_width)) for k_s in k]
                heads.append(sum(share / sum(shares) * v_s[part] for share, v_s in zip(shares, v, strict=True)))
            attended.append(torch.cat(heads))
        ys = [
            norm(f"{block}.attention.output.LayerNorm", x + dense(f"{block}.attention.output.dense", a))
            for x, a in zip(xs, attended, strict=True)
        ]
        inner = [dense(f"{block}.intermediate.dense", y) for y in ys]
        inner = [0.5 * h * (1 + torch.erf(h / math.sqrt(2))) for h in inner]
        xs = [
            norm(f"{block}.output.LayerNorm", y + dense(f"{block}.output.dense", h))
            for y, h in zip(ys, inner, strict=True)
        ]
    return torch.stack(xs)


def test_forward_agrees_with_slow_twin() -> None:
    model = make_model().double()
    ids = torch.randint(0, CONFIG.vocab_size, (9,), generator=torch.Generator().manual_seed(1)).tolist()
    ids_BT = torch.tensor([ids])
    x_BTE = model(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
    torch.testing.assert_close(x_BTE[0], slow_features(model.state_dict(), ids), rtol=1e-9, atol=1e-9)


def test_padding_does_not_leak() -> None:
    model = make_model()
    ids_BT = torch.tensor([[2, 4, 5, 8, 3], [2, 9, 3, 0, 0]])
    mask_BT = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    padded_BTE = model(ids_BT, mask_BT)
    alone_BTE = model(ids_BT[1:, :3], mask_BT[1:, :3])
    torch.testing.assert_close(padded_BTE[1:, :3], alone_BTE)
    torch.testing.assert_close(model.pooled(ids_BT, mask_BT)[1:], model.pooled(ids_BT[1:, :3], mask_BT[1:, :3]))


def test_mean_pool_ignores_padding_and_has_length_one() -> None:
    x_BTE = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [99.0, -99.0]]])
    pooled_BE = mean_pool(x_BTE, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(pooled_BE, torch.tensor([[0.6, 0.8]]))


def test_encode_counts_tokens_and_ends(encoder: TextEncoder) -> None:
    features = encoder.encode(PROMPTS)
    # Words, the plural of "dogs" as a piece of its own, and two ends.
    assert [x_TE.shape for x_TE in features] == [(5, 24), (2, 24), (12, 24), (3, 24)]
    assert all(x_TE.dtype == torch.float32 and not x_TE.requires_grad for x_TE in features)


def test_alone_equals_batch(encoder: TextEncoder) -> None:
    together = encoder.encode(PROMPTS)
    pooled_BE = encoder.pooled(PROMPTS)
    for index, prompt in enumerate(PROMPTS):
        assert torch.equal(encoder.encode([prompt])[0], together[index])
        assert torch.equal(encoder.pooled([prompt])[0], pooled_BE[index])


def test_together_agrees_with_alone(encoder: TextEncoder) -> None:
    prompts = ["red apple", "", "a very big red cat on a blue mat with an apple"]
    for alone, together in zip(encoder.encode(prompts), encoder.encode_together(prompts), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_pooled_agrees_with_model(encoder: TextEncoder) -> None:
    ids_BT = torch.tensor([[2, 4, 5, 8, 3]])
    expected_BE = encoder.model.pooled(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
    torch.testing.assert_close(encoder.pooled(["a red cat"]), expected_BE)


def test_too_long_prompt_is_cut_before_its_end(encoder: TextEncoder) -> None:
    words = ["red", "cat"] * 10
    (cut_TE,) = encoder.encode([" ".join(words)])
    assert encoder.num_cut(" ".join(words)) == 10
    assert torch.equal(cut_TE, encoder.encode([" ".join(words[:10])])[0])


def test_prompt_that_just_fits_is_read_whole(encoder: TextEncoder) -> None:
    (x_TE,) = encoder.encode([" ".join(["red"] * 10)])
    assert x_TE.shape[0] == 12
    assert encoder.num_cut(" ".join(["red"] * 10)) == 0


def test_save_and_load_quantised(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save(tmp_path)
    stored = load_file(tmp_path / WEIGHTS_NAME)
    name = "encoder.layer.1.intermediate.dense.weight"
    assert stored[name].dtype == torch.int8
    assert stored[f"{name}.scale"].dtype == torch.float16
    assert stored[f"{name}.scale"].shape == (48,)
    assert stored["embeddings.LayerNorm.bias"].dtype == torch.float16

    loaded = TextEncoder.from_folder(tmp_path)
    assert loaded.model.config == CONFIG
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.model.parameters())
    for x_TE, y_TE in zip(encoder.encode(PROMPTS), loaded.encode(PROMPTS), strict=True):
        assert torch.nn.functional.cosine_similarity(x_TE, y_TE).min() > 0.999
        assert not torch.equal(x_TE, y_TE)


def test_saving_again_changes_nothing(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save(tmp_path / "first")
    TextEncoder.from_folder(tmp_path / "first").save(tmp_path / "second")
    first, second = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("first", "second"))
    assert first.keys() == second.keys()
    integers = [name for name, w in first.items() if w.dtype == torch.int8]
    assert integers
    assert all(torch.equal(first[name], second[name]) for name in integers)


def test_save_unquantised_is_exact(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save(tmp_path, quantise=False)
    loaded = TextEncoder.from_folder(tmp_path)
    assert loaded.model.state_dict().keys() == encoder.model.state_dict().keys()
    wide = TextEncoder(model=loaded.model, tokenizer=loaded.tokenizer, max_tokens=12)
    for x_TE, y_TE in zip(encoder.encode(PROMPTS), wide.encode(PROMPTS), strict=True):
        assert torch.equal(x_TE, y_TE)


def test_load_in_bfloat16_returns_float32(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save(tmp_path)
    loaded = TextEncoder.from_folder(tmp_path, torch.bfloat16)
    assert loaded.model.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert loaded.encode(["a cat"])[0].dtype == torch.float32


def test_quantise_rows_stays_within_half_a_step() -> None:
    w_ij = torch.randn(40, 30, generator=torch.Generator().manual_seed(3)) * torch.logspace(-2, 2, 40).unsqueeze(1)
    w_ij[5] = 0
    steps_ij, scale_i = quantise_rows(w_ij)
    error_ij = (dequantise_rows(steps_ij, scale_i, torch.empty_like(w_ij)) - w_ij).abs()
    # A float16 scale may be low by one part in 2048, and then the largest entry is clamped.
    assert (error_ij <= scale_i.float().unsqueeze(1) * (0.5 + 127 / 2048)).all()
    assert error_ij[5].max() == 0


def test_published_names() -> None:
    names = MiniLM(CONFIG).state_dict().keys()
    ends = ("weight", "bias")
    expected = {f"embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type")}
    expected |= {f"embeddings.LayerNorm.{e}" for e in ends}
    for index in range(CONFIG.num_blocks):
        parts = [f"attention.self.{n}" for n in ("query", "key", "value")]
        parts += [f"{n}.{m}" for n in ("attention.output", "output") for m in ("dense", "LayerNorm")]
        parts += ["intermediate.dense"]
        expected |= {f"encoder.layer.{index}.{part}.{e}" for part in parts for e in ends}
    assert names == expected


@pytest.mark.parametrize("missing", [WEIGHTS_NAME, TOKENIZER_NAME])
def test_missing_file_is_named(encoder: TextEncoder, tmp_path: Path, missing: str) -> None:
    encoder.save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=f"needs {missing}, no such file"):
        TextEncoder.from_folder(tmp_path)


def test_weights_without_config_are_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS_NAME), tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="must carry `config`"):
        TextEncoder.from_folder(tmp_path)


@pytest.mark.parametrize("lost", ["embeddings.LayerNorm.bias", "encoder.layer.0.output.dense.weight.scale"])
def test_weights_that_lack_a_tensor_are_refused(encoder: TextEncoder, tmp_path: Path, lost: str) -> None:
    encoder.save(tmp_path)
    stored = load_file(tmp_path / WEIGHTS_NAME)
    del stored[lost]
    save_file(stored, tmp_path / WEIGHTS_NAME, metadata={"config": json.dumps(asdict(CONFIG))})
    with pytest.raises(CheckpointError, match=f"must fit its own configuration: .*{lost}"):
        TextEncoder.from_folder(tmp_path)


@pytest.mark.parametrize("config", ["{", "3", "{}x", '{"colour": 1}', '{"width": "wide"}', '{"width": 100}'])
def test_damaged_config_is_named_in_one_line(encoder: TextEncoder, tmp_path: Path, config: str) -> None:
    encoder.save(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS_NAME), tmp_path / WEIGHTS_NAME, metadata={"config": config})
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_NAME}: `config` in its metadata is damaged") as caught:
        TextEncoder.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("max_tokens", [2, 65])
def test_max_tokens_out_of_range(max_tokens: int) -> None:
    with pytest.raises(FoveateError, match=rf"max_tokens must be in \[3, 64\], got {max_tokens}"):
        TextEncoder(model=make_model(), tokenizer=make_tokenizer(), max_tokens=max_tokens)


def test_width_must_divide() -> None:
    with pytest.raises(FoveateError, match="width must be a multiple of num_heads = 12, got 100"):
        MiniLMConfig(width=100)


def test_no_prompts(encoder: TextEncoder) -> None:
    assert encoder.encode([]) == []
    with pytest.raises(FoveateError, match="prompts must hold at least one text"):
        encoder.pooled([])


def test_row_0_is_the_mean_and_stands_for_cls(encoder: TextEncoder) -> None:
    (x_TE,) = encoder.encode(["a red cat"])
    ids = encoder.tokenizer.encode("a red cat").ids
    ids_BT = torch.tensor([ids])
    raw_TE = encoder.model(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))[0]
    torch.testing.assert_close(x_TE[0], raw_TE.mean(0))
    assert torch.equal(x_TE[1:], raw_TE[1:])
    torch.testing.assert_close(encoder.pooled(["a red cat"])[0], x_TE[0] / x_TE[0].norm())
