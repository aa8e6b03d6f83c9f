"""The examples' data are the same everywhere, and the models are what they say."""

import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from dlnb.examples import ByteGPT, Digits, DigitsNet, PythonSource

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def source():
    return {split: PythonSource(split) for split in SPLITS}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ByteGPT(num_layers=2, num_heads=2, embed_dim=32, context_length=16)


def test_digits_are_stratified_and_each_is_in_one_split():
    digits = {split: Digits(split) for split in SPLITS}
    assert sorted(np.concatenate([dataset.indices for dataset in digits.values()])) == list(range(1_797))
    totals = np.bincount(load_digits().target)
    for split, share in {"train": 0.7, "val": 0.15, "test": 0.15}.items():
        assert np.abs(digits[split].labels.bincount().numpy() - share * totals).max() <= 1
    reference = load_digits()
    for dataset in digits.values():
        np.testing.assert_array_equal(dataset.labels, reference.target[dataset.indices])
        np.testing.assert_array_equal(dataset.images[:, 0] * 16, reference.images[dataset.indices])


def test_source_is_split_by_file_without_tests_and_installed_packages(source):
    files = [file for dataset in source.values() for file in dataset.files]
    assert len(files) == len(set(files)) > 500
    folders = {folder for file in files for folder in file.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "dist-packages"}
    assert 8e6 < sum(len(dataset.data) for dataset in source.values()) < 16e6
    assert len(source["train"].files) > 0.85 * len(files)


def test_a_files_split_depends_on_its_path_alone(source):
    # fixed for ever: a model trained on one machine is tested on another
    expected = {"abc.py": "train", "functools.py": "val", "fileinput.py": "test"}
    for file, split in expected.items():
        assert [name for name, dataset in source.items() if file in dataset.files] == [split]


def test_source_is_the_same_in_another_process(source):
    code = (
        "from hashlib import sha256; from dlnb.examples import PythonSource;"
        "print(sha256(PythonSource('val').data.numpy().tobytes()).hexdigest())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.strip() == sha256(source["val"].data.numpy().tobytes()).hexdigest()


def test_items_are_neighbouring_windows_of_the_text(source):
    dataset = source["val"]
    inputs = torch.cat([dataset[index][0] for index in range(50)])
    targets = torch.cat([dataset[index][1] for index in range(50)])
    text = dataset.data[: 50 * 128 + 1].long()
    assert torch.equal(inputs, text[:-1]) and torch.equal(targets, text[1:])
    assert dataset[len(dataset) - 1][1].shape == (128,)
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_byte_entropy_agrees_with_hand_arithmetic(source):
    counts = np.bincount(source["val"].data.numpy())
    shares = counts[counts > 0] / counts.sum()
    assert source["val"].byte_entropy() == pytest.approx(-(shares * np.log2(shares)).sum(), rel=1e-5)


def test_a_later_byte_never_changes_earlier_logits(model):
    inputs = torch.randint(256, (2, 16))
    logits = model(inputs)
    for place in range(1, 16):
        changed = inputs.clone()
        changed[:, place:] = (changed[:, place:] + 1) % 256
        assert torch.equal(model(changed)[:, :place], logits[:, :place])
        assert not torch.equal(model(changed)[:, place], logits[:, place])


def test_attention_agrees_with_torchs_encoder_layer(model):
    block = model.blocks[0].eval()
    reference = torch.nn.TransformerEncoderLayer(32, 2, 128, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    names = {
        "attention_norm.": "norm1.",
        "query_key_value.": "self_attn.in_proj_",
        "mlp_input.": "linear1.",
        "attention_output.": "self_attn.out_proj.",
        "mlp_norm.": "norm2.",
        "mlp_output.": "linear2.",
    }
    weights = {name: block.get_submodule(name[:-1]).state_dict() for name in names}
    reference.load_state_dict({names[name] + kind: weights[name][kind] for name in names for kind in ("weight", "bias")})
    stream = torch.randn(3, 16, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(16)
    torch.testing.assert_close(block(stream), reference(stream, src_mask=mask, is_causal=True))


def test_embedding_and_head_are_one_parameter_also_after_loading(model):
    assert model.head.weight is model.embedding.weight
    copy = ByteGPT(**model.hparams)
    copy.load_state_dict(model.state_dict())
    assert copy.head.weight.data_ptr() == copy.embedding.weight.data_ptr()
    assert sum(name in ("embedding.weight", "head.weight") for name, _ in model.named_parameters()) == 1


@pytest.mark.parametrize("num_layers, embed_dim, context_length", [(1, 32, 16), (3, 48, 64)])
def test_parameter_count(num_layers, embed_dim, context_length):
    model = ByteGPT(num_layers=num_layers, num_heads=2, embed_dim=embed_dim, context_length=context_length)
    expected = num_layers * (12 * embed_dim**2 + 13 * embed_dim) + (256 + context_length + 2) * embed_dim
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_generation_has_the_asked_length_and_follows_its_seed_alone(model):
    model.train()
    first = model.generate(b"import", 40, seed=1)  # longer than the context
    torch.rand(7)
    assert first == model.generate(b"import", 40, seed=1) and len(first) == 40
    assert first != model.generate(b"import", 40, seed=2)
    assert model.generate(b"import", 0) == b""
    assert model.training  # left as it was
    state = torch.get_rng_state()
    model.generate(b"import", 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_bits_per_byte_of_a_guess_without_knowledge_is_eight(model):
    torch.nn.init.zeros_(model.embedding.weight)
    inputs = torch.randint(256, (2, 16))
    assert model.predict_step((inputs, inputs), 0).tolist() == pytest.approx([8, 8])


@pytest.mark.parametrize("width, depth", [(1, 1), (7, 3)])
def test_digits_net_takes_any_width_and_depth(width, depth):
    net = DigitsNet(width=width, depth=depth, num_classes=4).eval()
    probabilities = net.predict_step((torch.rand(5, 1, 8, 8), None), 0)
    assert probabilities.shape == (5, 4)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))
