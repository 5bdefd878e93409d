"""Models and GGUF files loaded for inference: whole, without noise, the same each time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from limbeck import models
from limbeck.errors import ModelError

DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    models.release()
    return tmp_path / "cache"


def entries(root: Path) -> list[str]:
    """Everything in the cache but the locks, which hold nothing."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and p.suffix != ".lock")


def problem(caught: pytest.ExceptionInfo[ModelError]):
    [only] = caught.value.problems
    assert all(only), only
    assert len(str(caught.value).splitlines()) < 24
    return only


def test_a_model_is_loaded_for_inference_and_the_last_one_is_kept(teacher_dir, tmp_path):
    model = models.load_model(str(teacher_dir), "float32")
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert models.load_model(str(teacher_dir), "float32") is model
    assert models.load_model(str(teacher_dir), "bf16").dtype == torch.bfloat16
    assert models.load_model(str(teacher_dir), "float32") is not model
    last = models.load_model(str(teacher_dir), "float32")
    models.release()
    assert models.load_model(str(teacher_dir), "float32") is not last


def test_a_missing_or_misshapen_weight_is_refused_not_filled_with_noise(tmp_path):
    path = tiny.save(tmp_path / "m")
    weights = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed in (
        {n: w for n, w in weights.items() if n != name},
        weights | {name: torch.zeros(3, 3)},
    ):
        save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"mlp\.up_proj"):
            models.load_model(str(path), "float32")


def test_damaged_files_and_code_of_the_models_own_are_refused(tmp_path):
    path = tiny.save(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    own = config | {
        "model_type": "own",
        "auto_map": {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.Config"},
    }
    (path / "config.json").write_text(json.dumps(own))
    (path / "own.py").write_text("raise SystemExit('run')")
    with pytest.raises(ModelError) as caught:
        models.load_model(str(path), "float32")
    assert problem(caught).where == str(path)
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError):
        models.load_model(str(path), "float32")
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError):
        models.load_tokenizer(str(path))


def test_precision_follows_the_processor():
    here = models.processor()
    assert models.precision_dtype("auto") == (torch.bfloat16 if here.bf16 else torch.float32)
    assert models.precision_dtype("bf16") == torch.bfloat16
    assert models.precision_dtype("float32") == torch.float32
    assert here.cores >= 1
    assert here.device == ("cuda" if torch.cuda.is_available() else "cpu")


# GGUF


def write_gguf(path: Path, model, words, pre: str | None = "smollm", files: str = "gpt2") -> Path:
    """A model as llama.cpp stores it: its names, its key names, and its order of the rotary dimensions."""
    config = model.config
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    backend = json.loads(words.backend_tokenizer.to_str())
    special = {token["id"] for token in backend["added_tokens"]}
    out.add_tokenizer_model(files)
    if pre is not None:
        out.add_tokenizer_pre(pre)
    out.add_token_list(words.convert_ids_to_tokens(list(range(len(words)))))
    out.add_token_types([3 if i in special else 1 for i in range(len(words))])
    out.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    out.add_bos_token_id(words.bos_token_id)
    out.add_eos_token_id(words.eos_token_id)
    out.add_unk_token_id(words.unk_token_id)
    out.add_pad_token_id(words.pad_token_id)
    out.add_add_bos_token(False)
    out.add_chat_template(words.chat_template)
    for name, weight in model.state_dict().items():
        data = weight.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                halves = data.reshape(heads, 2, len(data) // heads // 2, -1)
                data = halves.swapaxes(1, 2).reshape(data.shape)
        if target := gguf_name(name):
            out.add_tensor(target, np.ascontiguousarray(data))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def gguf_name(name: str) -> str | None:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not name.startswith("model.layers."):
        return whole.get(name)
    _, _, layer, part = name.split(".", 3)
    inner = {
        **{f"self_attn.{a}_proj.weight": f"attn_{b}" for a, b in [("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")]},
        **{f"mlp.{a}_proj.weight": f"ffn_{a}" for a in ("gate", "up", "down")},
        "input_layernorm.weight": "attn_norm",
        "post_attention_layernorm.weight": "ffn_norm",
    }
    return f"blk.{layer}.{inner[part]}.weight"


def digits_first():
    """The tiny tokenizer, with merges that GPT-2's pattern alone would apply across the start of a number."""
    words = tiny.tokenizer(text=(*tiny.TEXT, *["x\n\n", "y  ", "z\n "] * 50))
    words.backend_tokenizer.pre_tokenizer = DIGITS
    return words


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    words = digits_first()
    model = tiny.llama(len(words), layers=2, seed=3)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", model, words), model, words


def test_a_gguf_file_is_converted_once_and_is_the_model_it_was_made_from(stored, own_cache, capfd):
    path, model, words = stored
    source = models.resolve(str(path))
    assert source.digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    loaded, read = models.load_model(str(path), "float32"), models.load_tokenizer(str(path))
    tokens = torch.tensor([words.encode("How many eggs?\n\n12 + 30 = 42.")])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    assert models.load_config(str(path), "float32").num_hidden_layers == 2
    assert models.stop_ids(loaded, read) == {words.eos_token_id}
    assert capfd.readouterr() == ("", "")
    models.release()
    before = {name: (own_cache / name).stat().st_mtime_ns for name in entries(own_cache)}
    assert torch.equal(models.load_model(str(path), "float32")(tokens).logits, loaded(tokens).logits)
    assert models.tokenizer_digest(models.load_tokenizer(str(path))) == models.tokenizer_digest(read)
    assert {name: (own_cache / name).stat().st_mtime_ns for name in entries(own_cache)} == before


TEXTS = st.text(st.sampled_from("ab1٣½ \n\t.é日<|im_end|>xQ'"), max_size=20) | st.text(max_size=20)


def test_a_gguf_tokenizer_splits_as_its_pre_tokenizer_says(stored):
    path, _, words = stored
    read = models.load_tokenizer(str(path))
    models.refuse_other_tokenizer("student", words, read)
    plain = digits_first()
    plain.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert read.encode("a\n\n1") != plain.encode("a\n\n1"), "the example must tell the two apart"

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def same(text: str) -> None:
        ids = words.encode(text, add_special_tokens=False)
        assert read.encode(text, add_special_tokens=False) == ids
        assert read.decode(ids, clean_up_tokenization_spaces=False) == text

    same()


@pytest.mark.parametrize("pre", ["some-new-one", "default", None])
def test_a_gguf_file_with_an_unknown_pre_tokenizer_is_refused(tmp_path, own_cache, pre):
    words = tiny.tokenizer()
    path = write_gguf(tmp_path / "m.gguf", tiny.llama(len(words), layers=1), words, pre=pre)
    with pytest.raises(ModelError) as caught:
        models.load_tokenizer(str(path))
    assert (repr(pre) if pre else "no word") in problem(caught).found
    assert entries(own_cache) == []


def test_a_damaged_gguf_file_is_refused_and_nothing_is_kept(stored, tmp_path, own_cache):
    whole = stored[0].read_bytes()
    for name, data in [("cut", whole[: len(whole) // 3]), ("other", b"NOPE" + whole[4:]), ("empty", b"")]:
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        for load in (models.load_tokenizer, models.load_model):
            with pytest.raises(ModelError) as caught:
                load(str(path))
            assert problem(caught).where == str(path)
    assert entries(own_cache) == []
