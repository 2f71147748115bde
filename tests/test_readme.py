"""The examples of the README run as they stand, and do what the lines around them say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hetlora

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def peft_model():
    """Two adapters of different ranks, as PEFT leaves them: the second is frozen until somebody says that it is trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), adapter_name="alice")
    model.add_adapter("bob", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model


def gradients(model, adapter):
    return {name: p.grad for name, p in model.named_parameters() if f".{adapter}." in name}


@pytest.mark.parametrize("page", ["README.md", "README.ko.md"])
def test_the_doors_train_every_adapter_as_if_it_were_alone(page, peft_model, capsys):
    batch = torch.randint(0, 64, (3, 8))
    frozen = dict(peft_model.named_parameters())
    assert not any(p.requires_grad for name, p in frozen.items() if ".bob." in name)
    fuse, segments = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    namespace = {"peft_model": peft_model, "batch": batch}
    exec(fuse, namespace)
    assert capsys.readouterr().out.startswith("fused 1 of 1 LoRA layers")
    exec(segments, namespace)
    together = {adapter: gradients(peft_model, adapter) for adapter in ("alice", "bob")}
    for adapter, rows in {"alice": [0, 2], "bob": [1]}.items():
        peft_model.zero_grad()
        peft_model.base_model.set_adapter(adapter)
        peft_model(input_ids=batch[rows], labels=batch[rows]).loss.backward()
        for name, grad in gradients(peft_model, adapter).items():
            assert together[adapter][name].norm() > 0, name
            torch.testing.assert_close(together[adapter][name], grad, msg=name)


def test_the_figures_of_the_first_screen_are_those_of_the_page():
    first = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split("### I use PEFT")[0].split())
    words = r"batch take (\S+) \(SmolLM2-135M\) and (\S+) \(BERT.*?adapter takes (\S+) and (\S+) with dropout 0\.1\..*?takes (\S+) and (\S+), which"
    found = re.search(words, first)
    assert found, f"README's first screen: expected the figures in the words of {words!r}"
    said = found.groups()
    summary = (ROOT / "docs" / "figures" / "peft.md").read_text(encoding="utf-8")
    rows = [re.search(rf"^\| training step, {model}[^|]*, {count}[^|]*\|([^|]*)\|([^|]*)\|", summary, re.MULTILINE).groups()
            for model, count in (("SmolLM2-135M 30", "8"), ("BERT-base 12", "8"), ("SmolLM2-135M 30", "one"), ("BERT-base 12", "one"))]  # fmt: skip
    eight_llama, eight_bert, one_llama, one_bert = ([cell.strip() for cell in row] for row in rows)
    assert said == (eight_llama[0], eight_bert[0], one_llama[1], one_bert[1], one_llama[0], one_bert[0])


@pytest.mark.slow
def test_the_federation_of_your_own_runs(tmp_path, monkeypatch):
    """The Python of docs/federation.md on a tiny model, for one round."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("tiny_model", ROOT / "examples" / "tiny_model.py")
    examples = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(examples)
    examples.write_tiny_model("llama", "my-model")
    for client in ("alice", "bob"):
        (tmp_path / "texts" / client).mkdir(parents=True)
        (tmp_path / "texts" / client / "a.txt").write_text(f"{client} writes a line. " * 100)
    code, in_memory, with_loggers = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "federation.md").read_text(encoding="utf-8"), re.DOTALL)
    namespace = {}
    exec(code.replace("rounds=20", "rounds=1"), namespace)
    namespace["cfg"] = hetlora.Config(ranks="powerlaw:2:4", rounds=1, output="runs/memory")
    namespace |= {"my_model": AutoModelForCausalLM.from_pretrained("my-model"), "my_tokenizer": AutoTokenizer.from_pretrained("my-model")}
    exec(in_memory.replace('"..."', repr("A line of text. " * 100)), namespace)
    assert set(namespace["result"].ranks) == {"alice", "bob"} and (tmp_path / "runs" / "memory" / "summary.json").is_file()
    exec(with_loggers.splitlines()[0], namespace)  # the loggers' own packages are tested in tests/federation/test_python.py
    assert set(namespace["result"].ranks) == {"alice", "bob"} and (tmp_path / "runs" / "mine" / "summary.json").is_file()


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    """Files that a page links to are there, and so are the headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", other.read_text(encoding="utf-8"), flags=re.DOTALL), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target
