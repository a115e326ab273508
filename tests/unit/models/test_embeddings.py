"""Facts about kept embeddings: computed once, read to the bit, never used when damaged, bounded, and read without a text encoder."""

import gc
import json
import os
import shutil
import weakref

import pytest
import tiny
import torch
from flow_models import SD3
from helpers import tdpo
from safetensors.torch import load_file, save_file

from tdpo_cli import models
from tdpo_cli.config.settings import Model
from tdpo_cli.models import loading, lora_file
from tdpo_cli.models.embedding_store import Store
from tdpo_cli.models.embeddings import Embeddings
from tdpo_cli.models.families.sd3 import StableDiffusion3
from tdpo_cli.models.family import Family

PROMPTS = ["a red circle", "two green squares beside a blue circle", "a"]
THREE = ["text_encoder", "text_encoder_2", "text_encoder_3"]


@pytest.fixture
def reads(monkeypatch):
    """How often text encoders were read from their files."""
    count, read = [], Family.read_text_encoders

    def counted(self):
        count.extend(name for name in self.unread if getattr(self.pipeline, name) is None)
        read(self)

    monkeypatch.setattr(Family, "read_text_encoders", counted)
    return count


@pytest.fixture
def alive(monkeypatch):
    """References to the text encoders that were used; without a collector, so that memory is known to be given back at once."""
    found, encode = [], StableDiffusion3.encode

    def remembered(self, prompts):
        found.extend(weakref.ref(getattr(self.pipeline, name)) for name in THREE)
        return encode(self, prompts)

    monkeypatch.setattr(StableDiffusion3, "encode", remembered)
    gc.disable()
    yield found
    gc.enable()


def load(folder, base=SD3, limit=10**9, prompts=PROMPTS, said=None, **settings):
    """A policy whose embeddings are kept in a folder."""
    kept = Embeddings(Store(folder), limit, lambda family: prompts, say=[].append if said is None else said.append)
    model = Model(base=str(base), lora_rank=2, **settings)
    return models.load(model, negative_prompt="blurred", placing=loading.Placing(embeddings=kept))


def files(folder):
    return sorted(folder.glob("*/*.safetensors"))


def same(one, other):
    return one.parts.keys() == other.parts.keys() and all(torch.equal(one.parts[name], other.parts[name]) for name in one.parts)


@pytest.mark.slow
def test_embeddings_are_the_same_to_the_bit_from_the_disk_and_without_one(tmp_path):
    first, second, without = load(tmp_path), load(tmp_path), load(tmp_path / "none", limit=0)
    assert len(files(tmp_path)) == len(PROMPTS) + 1 and not files(tmp_path / "none")
    expected = without.encode(PROMPTS)
    assert len(expected) == len(PROMPTS) + 1 and expected.parts["embeds"][:-1].std(0).max() > 0
    assert same(first.encode(PROMPTS), expected) and same(second.encode(PROMPTS), expected)
    assert same(second.encode(PROMPTS[::-1]), expected[[2, 1, 0, 3]])
    plain = models.load(Model(base=str(SD3), lora_rank=2), negative_prompt="blurred").encode(PROMPTS)
    assert all(torch.allclose(plain.parts[name], part, rtol=1e-5, atol=1e-5) for name, part in expected.parts.items())


@pytest.mark.slow
def test_second_start_reads_no_text_encoder(tmp_path, reads, alive):
    policy = load(tmp_path)
    assert reads == THREE and len(alive) > 3 and policy.family.pipeline.text_encoder is None and all(encoder() is None for encoder in alive)
    reads.clear()
    policy = load(tmp_path)
    policy.encode(PROMPTS)
    assert reads == [] and "text encoders not loaded" in policy.embeddings.words
    policy.encode(["a prompt of nobody"])  # still possible
    assert reads == THREE


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["a byte", "shorter", "of another prompt", "not a tensor file", "a folder"])
def test_damaged_embedding_is_named_and_computed_again(tmp_path, reads, damage):
    expected = load(tmp_path).encode(PROMPTS)
    victim, other = files(tmp_path)[:2]
    content = victim.read_bytes()
    if damage == "a folder":
        victim.unlink()
        victim.mkdir()
    else:
        changed = bytearray(content)
        changed[-5] ^= 1
        victim.write_bytes(
            {"a byte": bytes(changed), "shorter": content[:-9], "of another prompt": other.read_bytes(), "not a tensor file": b"{}"}[damage]
        )
    reads.clear()
    policy = load(tmp_path, said=(said := []))
    assert same(policy.encode(PROMPTS), expected) and reads
    if damage != "a folder":
        assert victim.name in said[0] and "damaged" in said[0]
        reads.clear()
        load(tmp_path)
        assert not reads  # it was written anew


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "tokenizer", "resolution"])
def test_other_text_encoder_has_other_embeddings(tmp_path, reads, what):
    base = tmp_path / "model"
    shutil.copytree(SD3, base)
    load(tmp_path / "kept", base)
    before = len(files(tmp_path / "kept"))
    if what == "weights":
        file = base / "text_encoder/model.safetensors"
        save_file({name: weight * 1.5 for name, weight in load_file(file).items()}, file, {"format": "pt"})
    elif what == "tokenizer":
        edit(base / "tokenizer/tokenizer_config.json", model_max_length=9)
    reads.clear()
    load(tmp_path / "kept", base, resolution=(32, 32) if what == "resolution" else None)
    assert reads and len(files(tmp_path / "kept")) == 2 * before


@pytest.mark.slow
def test_unchanged_files_are_not_read_again_for_their_digests(tmp_path, monkeypatch):
    from tdpo_cli.models import embedding_store

    load(tmp_path)
    monkeypatch.setattr(embedding_store, "hash_file", lambda path: pytest.fail(f"{path} was read"))
    load(tmp_path)


@pytest.mark.slow
def test_limit_removes_what_was_not_used_for_the_longest_time(tmp_path, reads):
    load(tmp_path, prompts=["old", "older"])
    size = files(tmp_path)[0].stat().st_size
    for age, path in enumerate(files(tmp_path)):
        os.utime(path, (1000 + age, 1000 + age))
    old = files(tmp_path)
    load(tmp_path, prompts=["new"], limit=size * 4)  # the negative prompt is there already
    kept = files(tmp_path)
    assert len(kept) <= 4 and set(kept) - set(old) and set(old) - set(kept)
    assert sum(path.stat().st_size for path in kept) <= size * 4
    reads.clear()
    load(tmp_path, prompts=["new"])
    assert not reads


def test_run_above_the_limit_keeps_nothing_and_says_so(tmp_path, reads):
    said = []
    policy = load(tmp_path, limit=1000, said=said)
    assert not files(tmp_path) and "run.cache_limit is 1.0 kB" in said[0] and policy.family.pipeline.text_encoder is not None
    reads.clear()
    policy.encode(PROMPTS)
    assert not reads


@pytest.mark.slow
def test_folder_that_cannot_be_written_costs_the_disk_alone(tmp_path, reads):
    place = tmp_path / "file"
    place.write_text("")
    said = []
    policy = load(place, said=said)
    assert any("not kept on disk" in line for line in said) and policy.family.pipeline.text_encoder is None
    reads.clear()
    assert same(policy.encode(PROMPTS), load(tmp_path / "kept").encode(PROMPTS))


@pytest.mark.slow
def test_resumed_run_reads_no_text_encoder_and_is_the_straight_one(tmp_path, reads):
    changes = {"model__base": str(SD3), "reward__train": "jpeg-incompressibility", "algorithm__name": "ddpo", "rollout__prompts": "sandbox"}
    preset = tiny.preset(tmp_path, **changes)

    def train(*arguments):
        outcome = tdpo("train", *arguments)
        assert outcome.status == 0, outcome.err
        return outcome.err

    said = train("--preset", preset, "--out", tmp_path / "run", "--epochs", 1, "--set", "run.cache_limit=none")
    assert "embeddings" in said and reads
    said = train("--preset", preset, "--out", tmp_path / "straight", "--epochs", 2)
    assert "encoding " in said and "text encoders released" in said
    reads.clear()
    said = train("--resume", "--out", tmp_path / "run", "--epochs", 2, "--set", "run.cache_limit=1GB")
    assert "text encoders not loaded" in said and not reads
    assert tiny.outcome_of(tmp_path / "run")[0] == tiny.outcome_of(tmp_path / "straight")[0]


@pytest.mark.slow
def test_fused_text_lora_is_never_mixed_up_with_the_plain_encoder(tmp_path, reads):
    plain = load(tmp_path / "kept")
    plain.save(tmp_path)
    file, layer = tmp_path / lora_file.FILE, "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    width, draw = json.loads((SD3 / "text_encoder/config.json").read_text())["hidden_size"], torch.Generator().manual_seed(0)
    halves = {"A": torch.randn(2, width, generator=draw), "B": torch.randn(width, 2, generator=draw)}
    save_file(load_file(file) | {f"{layer}.lora_{half}.weight": weight for half, weight in halves.items()}, file)
    reads.clear()
    fused = load(tmp_path / "kept", start_from=str(tmp_path), text_lora="fuse")
    assert reads and fused.embeddings is None and len(files(tmp_path / "kept")) == len(PROMPTS) + 1
    assert (fused.encode(PROMPTS).parts["embeds"] - plain.encode(PROMPTS).parts["embeds"]).abs().max() > 1e-3
