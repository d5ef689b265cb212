"""The network equals the published one, however prompts are cut and slots are shared."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from serve.errors import LoadError
from serve.models.llama import Llama, Piece

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,  # what products of few rows take of any processor
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TOKENS = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19]


def save(folder: Path, kind: str = "llama", *, sharded: bool = False, **changes: Any) -> Any:
    """Write a small random model and return transformers' own of it, in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TINY, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, 1.0, 0.5)
    model.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    return model


def load(folder: Path, *, slots: int = 4, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Llama:
    return Llama(folder, device=device, dtype=dtype, slots=slots, context_tokens=64)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save(folder)
    return folder


@pytest.fixture
def llama(tiny: Path) -> Llama:
    return load(tiny)


def read(llama: Llama, tokens: list[int], *, slot: int, start: int) -> torch.Tensor:
    return llama.prefill([Piece(tokens, slot=slot, start=start)])[0]


def near(found: torch.Tensor, expected: torch.Tensor, *, within: float = 0.01) -> bool:
    return bool((found - expected).abs().max() < within * expected.abs().max())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 16}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("mistral", {"sliding_window": None, "num_key_value_heads": 1}),
        ("qwen2", {}),
    ],
)
def test_a_family_computes_what_transformers_computes(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    reference = save(tmp_path, kind, sharded=kind == "qwen2", **changes)
    llama = load(tmp_path)
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    assert near(read(llama, TOKENS[:12], slot=1, start=0), expected[11], within=1e-5)
    for place in range(12, len(TOKENS)):
        assert near(llama.decode([TOKENS[place]], slots=[1], starts=[place])[0], expected[place], within=1e-5)


def test_a_prompt_read_in_pieces_is_the_prompt_read_at_once(llama: Llama) -> None:
    whole = read(llama, TOKENS, slot=0, start=0)
    for start in range(0, len(TOKENS), 7):
        pieces = read(llama, TOKENS[start : start + 7], slot=2, start=start)
    assert near(pieces, whole, within=1e-5)


def test_prompts_read_together_do_not_see_each_other(llama: Llama) -> None:
    prompts = {2: TOKENS[:9], 0: TOKENS[4:], 3: TOKENS[2:4]}
    alone = []
    for prompt in prompts.values():
        read(llama, prompt[:1], slot=1, start=0)
        alone.append(read(llama, prompt[1:], slot=1, start=1))
    llama.prefill([Piece(prompt[:1], slot=slot, start=0) for slot, prompt in prompts.items()])
    together = llama.prefill([Piece(prompt[1:], slot=slot, start=1) for slot, prompt in prompts.items()])
    for row, expected in zip(together, alone, strict=True):
        assert near(row, expected, within=1e-5)


def test_a_fresh_prompt_and_a_later_piece_are_read_together_as_apart(llama: Llama) -> None:
    fresh, late = TOKENS[3:11], TOKENS[:17]
    alone = [read(llama, fresh, slot=1, start=0), read(llama, late, slot=1, start=0)]
    read(llama, late[:12], slot=2, start=0)
    together = llama.prefill([Piece(fresh, slot=0, start=0), Piece(late[12:], slot=2, start=12)])
    for row, expected in zip(together, alone, strict=True):
        assert near(row, expected, within=1e-5)


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [1, 3], [3]])
def test_rows_of_different_lengths_do_not_see_each_other(llama: Llama, slots: list[int]) -> None:
    for slot in range(4):
        read(llama, [90 - slot] * 30, slot=slot, start=0)  # what earlier streams left in the cache
    lengths = [3, 17, 1, 9]
    alone = []
    for slot in slots:
        read(llama, TOKENS[: lengths[slot]], slot=0, start=0)
        alone.append(llama.decode([slot + 5], slots=[0], starts=[lengths[slot]])[0])
    for slot in slots:
        read(llama, TOKENS[: lengths[slot]], slot=slot, start=0)
    together = llama.decode([slot + 5 for slot in slots], slots=slots, starts=[lengths[slot] for slot in slots])
    for row, expected in zip(together, alone, strict=True):
        assert near(row, expected, within=1e-5)


def test_the_whole_context_can_be_used(llama: Llama) -> None:
    read(llama, TOKENS * 3, slot=3, start=0)
    for start in range(60, 64):
        assert llama.decode([1], slots=[3], starts=[start]).isfinite().all()


def test_greedy_tokens_are_those_of_transformers(smollm2_folder: Path, smollm2_greedy: list[Any]) -> None:
    llama = Llama(smollm2_folder, device="cpu", dtype=torch.float32, slots=1, context_tokens=256)
    for answer in smollm2_greedy[:4]:
        prompt, ids = answer["prompt_ids"], answer["ids"][:24]
        read(llama, prompt, slot=0, start=0)
        for place, (token, following) in enumerate(itertools.pairwise(ids)):
            assert llama.decode([token], slots=[0], starts=[len(prompt) + place]).argmax() == following


def test_float16_on_a_cpu_is_near(tiny: Path) -> None:
    llama, exact = load(tiny, dtype=torch.float16), load(tiny)
    for model in (llama, exact):
        read(model, TOKENS, slot=0, start=0)
    rows = [model.decode([5], slots=[0], starts=[len(TOKENS)]) for model in (llama, exact)]
    assert near(*rows)
    assert not torch.equal(*rows), "its weights are held in float16"


def test_bfloat16_is_near(tiny: Path) -> None:
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        llama = load(tiny, dtype=dtype)
        read(llama, TOKENS, slot=0, start=0)
        rows.append(llama.decode([5], slots=[0], starts=[len(TOKENS)]))
    assert near(rows[0], rows[1], within=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 0.01), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_a_gpu_computes_the_same(tiny: Path, dtype: torch.dtype, within: float) -> None:
    rows = []
    for llama in (load(tiny, device="cuda", dtype=dtype), load(tiny)):
        read(llama, TOKENS, slot=0, start=0)
        read(llama, TOKENS[:5], slot=2, start=0)
        rows.append(llama.decode([5, 6], slots=[0, 2], starts=[len(TOKENS), 5]).logits.cpu())
    assert near(rows[0], rows[1], within=within)


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(
            json.dumps({k: v for k, v in {**json.loads(path.read_text()), **changes}.items() if v != "out"})
        )

    return change


def write_index(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(text)


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return rewrite


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (change_config(model_type="gpt_neox"), "'gpt_neox' is not supported.*supported: llama, mistral, qwen2"),
        (change_config(model_type="mistral", sliding_window=4096), "sliding_window 4096"),
        (change_config(model_type="qwen2", sliding_window=4096, use_sliding_window=True), "sliding_window 4096"),
        (change_config(hidden_act="gelu"), "hidden_act 'gelu'"),
        (change_config(quantization_config={"quant_method": "awq"}), "quantization_config"),
        (change_config(rope_parameters={"rope_type": "yarn"}), "rope scaling 'yarn'"),
        (
            change_config(rope_parameters={k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}),
            "config.json of the model lacks 'low_freq_factor' in its rope scaling",
        ),
        (write_index("{"), "model.safetensors.index.json of the model has no usable weight_map: JSONDecodeError"),
        (write_index("{}"), "model.safetensors.index.json of the model has no usable weight_map: .*'weight_map'"),
        (write_index('{"weight_map": []}'), "model.safetensors.index.json of the model has no usable weight_map"),
        (change_config(max_position_embeddings=32), "context_tokens 64 is above the model's 32"),
        (change_config(hidden_size="out"), "lacks 'hidden_size'"),
        (change_config(vocab_size=98), r"embed_tokens.weight has shape \[97, 64\] where config.json says \[98, 64\]"),
        (lambda folder: (folder / "config.json").unlink(), "config.json of the model is not readable"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not an object but list"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors of the model is not readable"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 64), "model.safetensors .* not readable"),
        (change_tensors(lambda t: t.pop("model.norm.weight")), "lack the tensor model.norm.weight"),
        (
            change_tensors(lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(32)})),
            "tensors that its architecture does not: model.layers.0.self_attn.o_proj.bias",
        ),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, change: Callable[[Path], None], complaint: str) -> None:
    save(tmp_path)
    change(tmp_path)
    with pytest.raises(LoadError, match=complaint):
        load(tmp_path)
