"""Conversations: what is written by a template, which tokens are predicted, what is left out, packing, samples; rows in CSV and Parquet."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_rouge import byte_federation
from tiny import tiny_config
from transformers import ByT5Tokenizer

import hetlora_kernels as hk
from hetlora import Config, ConfigError
from hetlora.batches import collate
from hetlora.chat import CHATML, Chat, packed
from hetlora.client import local_steps, step_batches
from hetlora.data import load_data, predicted, token_ids
from hetlora.evaluate import evaluate_bank
from hetlora.loop import simulate
from hetlora.report.page import write_report
from hetlora.sources import read_prompts

TOKENIZER = ByT5Tokenizer()
EOS = TOKENIZER.eos_token_id
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]
WRITTEN = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\nciao<|im_end|>\n"


def config(**settings) -> Config:
    return Config(**{"messages_field": "messages", "template": "chatml", "seq_len": 400, **settings})


def parts(sequence: torch.Tensor) -> list[tuple[bool, str]]:
    """Runs of tokens that are (True) or are not predicted, as text; EOS as '$'."""
    runs: list[tuple[bool, list[int]]] = []
    for token in sequence.tolist():
        if not runs or runs[-1][0] != (token >= 0):
            runs.append((token >= 0, []))
        runs[-1][1].append(token if token >= 0 else ~token)
    return [(own, "".join("$" if t == EOS else chr(t - 3) for t in ids)) for own, ids in runs]


def test_answers_and_what_ends_them_are_predicted_and_nothing_else():
    sequence, (prompt, response) = Chat(config(), TOKENIZER).sequence(TALK)
    first, second = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"
    assert parts(sequence) == [(False, first), (True, "hello<|im_end|>\n"), (False, second), (True, "ciao<|im_end|>\n$")]
    assert response == "ciao"
    assert parts(prompt) == [(True, first + "hello<|im_end|>\n" + second)]
    assert predicted(sequence) == len("hello<|im_end|>\nciao<|im_end|>\n$")


def test_loss_on_all():
    sequence, _ = Chat(config(loss_on="all"), TOKENIZER).sequence(TALK)
    assert parts(sequence) == [(True, WRITTEN + "$")]


def test_the_mask_is_the_one_that_transformers_makes_of_a_template_with_generation_marks():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "</s>", *letters])}, []))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    marked = (
        "{% for message in messages %}{{ '<' + message['role'] + '>' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '</s>' }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="</s>", pad_token="<pad>", chat_template=marked)
    system = [{"role": "system", "content": "be brief"}, *TALK]
    theirs = tokenizer.apply_chat_template(system, return_assistant_tokens_mask=True, return_dict=True)
    ours, _ = Chat(config(template=""), tokenizer).sequence(system)
    assert token_ids(ours).tolist() == theirs["input_ids"]
    assert (ours >= 0).long().tolist() == theirs["assistant_masks"]
    assert sum(theirs["assistant_masks"]) > 8


def test_a_system_prompt_stands_before_conversations_that_have_none():
    own = [{"role": "system", "content": "own"}, *TALK]
    written = [parts(Chat(config(system_prompt="be brief"), TOKENIZER).sequence(talk)[0])[0][1] for talk in (TALK, own)]
    assert written[0].startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi")
    assert written[1].startswith("<|im_start|>system\nown<|im_end|>\n<|im_start|>user\nhi")


def test_a_prompt_is_written_as_in_training():
    chat = Chat(config(system_prompt="be brief"), TOKENIZER)
    _, (prompt, _) = chat.sequence(TALK[:2])
    assert chat.prompt("hi") == prompt.tolist()


FIRST = len("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_a_long_conversation_is_cut_at_its_end_and_left_out_without_an_answer():
    with pytest.warns(UserWarning, match=f"1 conversations of more than seq_len = {FIRST + 3} tokens: cut at their end"):
        chat = Chat(config(seq_len=FIRST + 3), TOKENIZER)
        sequence, (_, response) = chat.sequence(TALK)
        chat.warn()
    assert parts(sequence)[1] == (True, "hel") and len(sequence) == FIRST + 3 and response == "hello"
    with pytest.warns(UserWarning, match="1 conversations left out: no answer begins within seq_len"):
        chat = Chat(config(seq_len=FIRST), TOKENIZER)
        assert chat.sequence(TALK) is None
        chat.warn()


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]], ids=["plain", "system"])
def test_the_oldest_exchanges_are_left_out_first(system):
    whole = len(Chat(config(), TOKENIZER).sequence([*system, *TALK])[0])
    chat = Chat(config(truncate="turns", seq_len=whole - 1), TOKENIZER)
    shorter, _ = chat.sequence([*system, *TALK])
    assert torch.equal(shorter, Chat(config(), TOKENIZER).sequence([*system, *TALK[2:]])[0])
    with pytest.warns(UserWarning, match="1 oldest exchanges left out"):
        chat.warn()
    assert torch.equal(
        Chat(config(truncate="turns", seq_len=whole), TOKENIZER).sequence([*system, *TALK])[0], Chat(config(), TOKENIZER).sequence([*system, *TALK])[0]
    )
    cut, _ = Chat(config(truncate="turns", seq_len=len(shorter) - 2), TOKENIZER).sequence([*system, *TALK])
    assert torch.equal(cut, shorter[:-2])


def write(folder: Path, rows: list[dict], kind: str = "jsonl") -> str:
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()} for row in rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def talk(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CHATS = [{"client": f"u{k}", "messages": talk("say a", word * 3, "and?", word)} for k, word in enumerate(["red", "green"]) for _ in range(5)]


def load(path: str, **settings):
    return load_data(Config(**{"data": path, "messages_field": "messages", "template": "chatml", "seq_len": 300, **settings}), TOKENIZER)


def test_rows_of_messages_become_clients(tmp_path):
    rows = [*CHATS, {"client": "u0", "messages": [*talk("q", "a", "dangling")]}, {"client": "u0", "messages": talk("alone")}]
    data = load(write(tmp_path, rows))
    assert [(client.name, len(client.train), len(client.test)) for client in data.clients] == [("u0", 5, 1), ("u1", 4, 1)]
    assert parts(data.clients[0].test[0])[-1] == (True, "a<|im_end|>\n$"), "what follows the last answer is not used"
    assert data.clients[0].examples[0][1] == "a"


def test_prompts_may_be_written_by_the_template_too(tmp_path):
    path = write(tmp_path, [{"client": "u", "ask": "hi", "text": "hello"}] * 3)
    plain = load(path, messages_field="", template="", prompt_field="ask").clients[0]
    masked = load(path, messages_field="", template="", prompt_field="ask", loss_on="response").clients[0]
    chat = load(path, messages_field="", prompt_field="ask").clients[0]
    assert parts(plain.train[0]) == [(True, "hihello$")] and parts(masked.train[0]) == [(False, "hi"), (True, "hello$")]
    assert torch.equal(chat.train[0], Chat(config(), TOKENIZER).sequence(TALK[:2])[0])
    assert [client.examples[0][0].tolist() for client in (plain, masked)] == [[ord(c) + 3 for c in "hi"]] * 2


def test_packing_joins_training_examples_of_one_client_and_no_others(tmp_path):
    alone, joined = (load(write(tmp_path, CHATS), pack=pack, seq_len=500) for pack in (False, True))
    for mine, theirs in zip(joined.clients, alone.clients, strict=True):
        assert torch.equal(torch.cat(mine.train), torch.cat(theirs.train)) and all(torch.equal(a, b) for a, b in zip(mine.test, theirs.test, strict=True))
        assert max(map(len, mine.train)) <= 500 and len(mine.train) < len(theirs.train)


def test_packing_keeps_the_order_and_wastes_nothing_that_fits():
    sequences = [torch.full((n,), n) for n in (4, 3, 3, 5, 9, 1)]
    assert [len(pack) for pack in packed(sequences, 10)] == [10, 5, 10]
    assert torch.equal(torch.cat(packed(sequences, 10)), torch.cat(sequences))


# ---------------------------------------------------------------- training and evaluation


def test_losses_are_those_of_the_responses_alone(tmp_path):
    """Local training's loss, and evaluation's, against plain PyTorch over the predicted positions."""
    cfg = tiny_config(tmp_path / "run", data=write(tmp_path, CHATS), messages_field="messages", template="chatml", seq_len=128, ranks="fixed:4", batch_size=3)
    federation = byte_federation(cfg)
    client = federation.data.clients[0]
    assert len({len(s) for s in client.train}) == 1 and predicted(client.train[0]) < len(client.train[0]) - 1

    def expected(sequences):
        total = count = 0
        for sequence in sequences:
            logits = federation.model(input_ids=token_ids(sequence)[None]).logits[0]
            places = [i for i in range(1, len(sequence)) if sequence[i] >= 0]
            total += sum(float(F.cross_entropy(logits[i - 1], sequence[i])) for i in places)
            count += len(places)
        return total / count, count

    class Nothing:
        def zero_grad(self): ...

        def step(self): ...

    federation.model.requires_grad_(True)
    result = local_steps(federation.model, client, cfg, 1, Nothing(), torch.device("cpu"), lambda *_: contextlib.nullcontext())
    first = [client.train[i] for i in step_batches(client, cfg, 1)[0]]
    assert result.loss_first == pytest.approx(expected(first)[0], rel=1e-5)
    federation.model.requires_grad_(False)
    found = evaluate_bank(federation.model, hk.AdapterBank(federation.shapes, [4]), client.test, cfg.scale, 4096)  # B = 0
    loss, count = expected(client.test)
    assert found["tokens"] == count and found["loss"] == pytest.approx(loss, rel=1e-5)


def test_padding_and_context_have_no_label():
    ids, labels = collate([torch.tensor([~5, 6, 7]), torch.tensor([8, 9])], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 9, 0]] and labels.tolist() == [[-100, 6, 7], [8, 9, -100]]


@pytest.mark.parametrize("train", ["adapters", "fold", "full"])
def test_a_run_on_conversations_shows_samples_before_and_after(tmp_path, train):
    (tmp_path / "prompts.txt").write_text("say <b>a</b>\n\nand?\n")
    other = {"weights": "samples"} if train == "full" else {"ranks": "2,4"}
    settings = {"train": train, "gamma": 0.99, **({"ranks": "powerlaw:5:50"} if train == "full" else {}), **other}
    cfg = tiny_config(
        tmp_path / "run",
        **{"data": write(tmp_path, CHATS), "messages_field": "messages", "template": "chatml", "seq_len": 128, "rounds": 2, "lr": 0.02, **settings},
        sample_prompts=str(tmp_path / "prompts.txt"),
        rouge_tokens=5,
    )
    result = simulate(cfg, federation=byte_federation(cfg), quiet=True)
    shown = [record["evaluation"].get("samples") for record in result.history]
    assert shown[1] is None and [[own["prompt"] for own in samples] for samples in (shown[0], shown[2])] == [["say <b>a</b>", "and?"]] * 2
    assert result.summary["evaluation_after"]["samples"] == shown[2]
    if train == "adapters":
        page = write_report(tmp_path / "run").read_text()
        assert "<h2>Samples</h2>" in page and "say &lt;b&gt;a&lt;/b&gt;" in page


# ---------------------------------------------------------------- CSV and Parquet


def same(one, other) -> bool:
    return [client.name for client in one.clients] == [client.name for client in other.clients] and all(
        torch.equal(a, b)
        for mine, yours in zip(one.clients, other.clients, strict=True)
        for a, b in zip([*mine.train, *mine.test], [*yours.train, *yours.test], strict=True)
    )


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("case", ["text", "messages", "prompt"])
def test_a_table_gives_the_clients_that_jsonl_gives(tmp_path, kind, case):
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install '.[parquet]')")
    rows = {
        "text": [{"client": f"c{k % 3}", "text": f'line {k}, "quoted"\r\nand\u2028more ' * 9, "unused": 1.5} for k in range(9)],
        "messages": CHATS,
        "prompt": [{"ask": f"q{k}", "text": f"a, {k}", "client": "c"} for k in range(4)],
    }[case]
    settings = {"messages": {}, "text": {"messages_field": "", "template": ""}, "prompt": {"messages_field": "", "template": "", "prompt_field": "ask"}}[case]
    assert same(load(write(tmp_path, rows, kind), **settings), load(write(tmp_path, rows), **settings))


def test_a_capability_in_a_csv_file(tmp_path):
    rows = [{"client": f"c{k % 2}", "text": "x" * 400, "ram": [4, 8.5][k % 2]} for k in range(4)]
    settings = {"messages_field": "", "template": "", "ranks": "column:ram:2:8"}
    assert [client.capability for client in load(write(tmp_path, rows, "csv"), **settings).clients] == [4, 8.5]
    rows[3]["ram"] = "much"
    with pytest.raises(ConfigError, match=r"row 4 \(line 5\): 'ram' of client 'c1' must be a finite number, got 'much'"):
        load(write(tmp_path, rows, "csv"), **settings)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no column 'text'; it has none at all;"),
        (b"client;text\na;b\n", "no column 'text'; it has 'client;text' alone; separate columns by commas"),
        (b"client,other\n", "no column 'text'; it has 'client', 'other'"),
        (b"client,text,text\nc,a,b\n", "the column 'text' comes twice"),
        (b"client,text\nc,a,b\n", r"row 1 \(line 2\): 3 cells, the header has 2; quote texts with commas"),
        (b"client,text\nc\n", r"row 1 \(line 2\): 1 cells, the header has 2"),
        (b'client,text\nc,"open\n', "no CSV in UTF-8"),
        (b"client,text\nc,\xff\n", "no CSV in UTF-8"),
        ("client,text\nc,a\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, content, reason):
    (tmp_path / "d.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as error:
        load(str(tmp_path / "d.csv"), messages_field="", template="")
    assert "d.csv" in str(error.value) and "\n" not in str(error.value)


def test_parquet_without_its_package_or_that_is_none(tmp_path, monkeypatch):
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nothing")
    if importlib.util.find_spec("pyarrow"):
        with pytest.raises(ConfigError, match=r"d\.parquet: cannot be read as Parquet"):
            load(str(tmp_path / "d.parquet"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"d\.parquet: .*pip install '\.\[parquet\]'"):
        load(str(tmp_path / "d.parquet"))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hi", "'messages' must be a list of messages {'role', 'content'}, got str"),
        ([{"role": "user"}], "message 1 of 'messages' must have a 'role' and a 'content' that are text"),
        ([{"from": "human", "value": "x"}], "message 1 of 'messages' must have"),
        ([*talk("a"), {"role": "bot", "content": "b"}], "message 2 of 'messages': role 'bot', expected one of system, user, assistant, tool"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1 of 'messages' must have a 'role' and a 'content' that are text"),
    ],
)
def test_rows_that_are_no_conversation_are_bad_rows(tmp_path, messages, reason):
    path = write(tmp_path, [*CHATS, {"client": "u0", "messages": messages}])
    with pytest.raises(ConfigError) as error:
        load(path)
    assert f"line 11: {reason}" in str(error.value) and "--skip-bad-rows" in str(error.value)
    with pytest.warns(UserWarning, match="1 rows left out"):
        assert same(load(path, skip_bad_rows=True), load(write(tmp_path, CHATS)))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "the chat template refuses it .*roles must alternate"),
        ("{% for m in messages %}{{ m['content'] if loop.last else '' }}{% endfor %}", "does not write message 2 behind what it asks with"),
    ],
)
def test_a_template_that_cannot_write_it_is_named(tmp_path, template, reason):
    (tmp_path / "mine.jinja").write_text(template)
    path = write(tmp_path, CHATS)
    with pytest.raises(ConfigError, match=f"data: conversation 1 of client 'u0': .*{reason}.*--skip-bad-rows"):
        load(path, template=str(tmp_path / "mine.jinja"))


def test_a_template_that_is_none_is_at_fault_itself(tmp_path):
    """Not the conversation that it would have written first: leaving rows out would not help."""
    (tmp_path / "mine.jinja").write_text("{{ messages }}\n{% for")
    with pytest.raises(ConfigError, match=r"^template: .*mine\.jinja is not valid jinja2 \(line 2: [^)]+\)$"):
        load(write(tmp_path, CHATS), template=str(tmp_path / "mine.jinja"))


def test_a_template_of_a_file_is_used(tmp_path):
    (tmp_path / "mine.jinja").write_text(CHATML)
    path = write(tmp_path, CHATS)
    assert same(load(path, template=str(tmp_path / "mine.jinja")), load(path))


def test_no_template_at_all_says_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match="has no chat template; give --template chatml, or a file in jinja2"):
        load(write(tmp_path, CHATS), template="")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"messages_field": "m", "prompt_field": "p"}, "prompt_field = 'p': with messages_field the conversation holds all text"),
        ({"messages_field": "m", "text_field": "t"}, "text_field = 't': with messages_field"),
        ({"truncate": "turns"}, "truncate = 'turns': only conversations have exchanges"),
        ({"pack": True}, "pack = True: of examples, and the data is running text"),
        ({"template": "chatml"}, "template = 'chatml': of examples"),
        ({"loss_on": "response"}, "loss_on = 'response': of examples"),
        ({"system_prompt": "s", "prompt_field": "p"}, "system_prompt: written by a chat template, and none is in force"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        Config(**settings)


@pytest.mark.parametrize(("content", "reason"), [("\n \n", "expected 1 to 100 prompts, one a line, got 0"), ("a\n" * 101, "got 101"), (None, "cannot be read")])
def test_a_file_of_prompts_that_cannot_be_used(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "p.txt").write_text(content)
    with pytest.raises(ConfigError, match=reason):
        read_prompts(Config(sample_prompts=str(tmp_path / "p.txt")))


def test_a_client_of_empty_answers_has_too_little(tmp_path):
    path = write(tmp_path, [*CHATS, {"client": "mute", "messages": talk("a", " ")}])
    with pytest.raises(ConfigError, match=r"need at least 2 examples\): 'mute'"):
        load(path)
