"""Every kind of dataset: what is read, what is refused by name, what is counted; each a file as people have it."""

import csv
import gzip
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from engine.base.errors import DataError
from engine.data.chats import parse_chat
from engine.data.dataset import encode_block, encode_rows
from engine.data.rows import read_rows
from engine.data.values import BadRow
from engine.text.templates import encode_prompt
from engine.text.tokenizer_files import load_tokenizer
from tests.helpers.chat_tokenizers import CHATML, LLAMA3, write_byte_level
from tests.helpers.own_rows import EVALUATION, write_evaluation

ALPACA = {"instruction": "Who are you?", "input": "", "output": "A captain!"}
USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CHAT = {"messages": [USER, ANSWER]}
CALL = {"name": "get_weather", "arguments": {"city": "Bern", "days": 3}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
TOOL_CHAT = {
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": "Weather in Bern?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It rains."},
    ],
}


@pytest.fixture
def write(tmp_path):
    def write(content, name="data.jsonl"):
        if isinstance(content, dict):
            content = [content]
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return tmp_path / name

    return write


def read(path, **options):
    return read_rows([path], **options)[0]


def refusal(path, **options):
    with pytest.raises(DataError) as caught:
        read_rows([path], **options)
    return str(caught.value)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    kinds = {"alpaca": CHATML, "chatml": CHATML, "llama2": CHATML, "llama3": LLAMA3, "template": CHATML}
    template = (
        "{{ bos_token }}{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    return {
        style: load_tokenizer(write_byte_level(folder / style, specials, chat_template=template))
        for style, specials in kinds.items()
    }


def trained(row, style, tokenizers):
    """Return (all of the text, what carries loss) of a row, special tokens as their text."""
    tokenizer = tokenizers[style]
    names = {id: text for text, id in tokenizer.special_ids.items()}
    ids, is_target, _ = encode_block([row], tokenizer, style)

    def text(ids):
        return "".join(names.get(id) or tokenizer.decode([id]) for id in ids)

    return text(ids.tolist()), text(ids[is_target].tolist())


# ---- keys that change what a row means ------------------------------------------------------------------------------


def test_alpacas_system_and_history_are_in_the_prompt(write, tokenizers):
    row = ALPACA | {"system": "You are a pirate.", "history": [["Hi", "Ahoy!"], ["Well?", "Aye."]]}
    (read_row,) = read(write(row))
    assert read_row.messages == (
        ("system", "You are a pirate."), ("user", "Hi"), ("assistant", "Ahoy!"), ("user", "Well?"),
        ("assistant", "Aye."), ("user", "Who are you?"), ("assistant", "A captain!"),
    )  # fmt: skip
    whole, learned = trained(read_row, "chatml", tokenizers)
    assert whole.startswith("<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")
    assert learned == "Ahoy!<|im_end|>Aye.<|im_end|>A captain!<|im_end|>"
    with pytest.raises(DataError, match="a system text or history, which the alpaca style cannot say"):
        trained(read_row, "alpaca", tokenizers)
    for empty in ({"system": "", "history": []}, {"system": None, "history": None}):
        assert read(write(ALPACA | empty))[0].messages is None


def test_an_instruction_of_a_history_is_asked_as_one_without(write, tokenizers):
    plain, long = read(write([ALPACA | {"input": "x"}, ALPACA | {"input": "x", "history": [["a", "b"]]}]))
    assert trained(long, "chatml", tokenizers)[0].endswith(trained(plain, "chatml", tokenizers)[0])


@pytest.mark.parametrize("style", ["chatml", "llama2", "llama3", "template"])
@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_a_weight_of_0_takes_the_loss_from_an_answer_and_nothing_else(write, tokenizers, style, key):
    turns = [USER, ANSWER | {"content": "5"}, USER, ANSWER, USER, ANSWER | {"content": "6"}]
    weighted = [turn | ({key: i // 2 % 2} if i % 2 else {}) for i, turn in enumerate(turns)]
    plain, row = read(write([{"messages": turns}, {"messages": weighted}]))
    whole, learned = trained(plain, style, tokenizers)
    assert "5" in learned and "6" in learned
    whole_too, learned = trained(row, style, tokenizers)
    assert whole_too == whole and "4" in learned and "5" not in learned and "6" not in learned
    n_ends = learned.count("<|im_end|>") + learned.count("<|eot_id|>") + learned.count("</s>")
    assert n_ends == 1
    assert encode_prompt(row, tokenizers[style], style) == encode_prompt(plain, tokenizers[style], style)


def test_a_weight_of_0_contradicts_loss_on_everything(write, tokenizers):
    (row,) = read(write({"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER]}))
    with pytest.raises(DataError, match=r"data\.jsonl:1: has an answer that carries no loss .* leave one of them out"):
        encode_rows([row], tokenizers["chatml"], "chatml", train_on_prompt=True)


REFUSED = {
    "label": (CHAT | {"label": False}, "label: got False, wanted true"),
    "label 0": (ALPACA | {"label": 0}, "label: got 0, wanted true"),
    "a class": ({"text": "fine", "label": "positive"}, "label: got 'positive'"),
    "images": (CHAT | {"images": ["a.jpg"]}, "images: got ['a.jpg'], wanted text alone"),
    "image": (ALPACA | {"image": "a.jpg"}, "image: got 'a.jpg', wanted text alone"),
    "videos": (ALPACA | {"videos": ["a.mp4"]}, "videos: got ['a.mp4']"),
    "audio": (CHAT | {"audio": {"path": "x"}}, "audio: got"),
    "image of a message": ({"messages": [USER | {"images": ["x"]}, ANSWER]}, "messages[0].images: got ['x']"),
    "a part": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
        "messages[0].content[0].type: got 'image_url', wanted 'text'",
    ),
    "chosen": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "wanted one answer, since preferences"),
    "rejected": (ALPACA | {"rejected": "c"}, "rejected: got 'c', wanted one answer"),
    "chosen of chats": ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "since preferences are not learned"),
    "kto_tag": (ALPACA | {"kto_tag": False, "input": "x"} | {"kto_tag": "no"}, "kto_tag: got 'no'"),
    "weight of half": ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "messages[1].weight: got 0.5, wanted 0 or 1"),
    "weight of a user": ({"messages": [USER | {"weight": 1}, ANSWER]}, "messages[0].weight: got 1 on a message of the"),
    "weight of a row": (ALPACA | {"weight": 0.3}, "weight: got 0.3, wanted 1"),
    "train_detail": ({"messages": [USER, ANSWER | {"train_detail": [{}]}]}, "messages[1].train_detail: got"),
    "tools": (TOOL_CHAT, "tools: got tools that may be called, which a checkpoint's own chat template alone can say"),
    "calls": ({"messages": TOOL_CHAT["messages"]}, "messages[1].tool_calls: got a call of a tool"),
    "a tool's role": ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].role 'tool': got a call of"),
    "function_call": ({"messages": [USER, ANSWER | {"function_call": CALL}]}, "messages[1].function_call: got"),
    "system twice": ({"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"}, "both system"),
    "two systems": (ALPACA | {"system": "b", "system_prompt": "c"}, "got both system and system_prompt"),
    "system of a text": ({"text": "a", "system": "b"}, "system: got it beside text, which has no place for it"),
    "system of a prompt": ({"prompt": "a", "completion": "c", "system": "b"}, "beside a prompt of text"),
    "history of a chat": (CHAT | {"history": [["a", "b"]]}, "history: got it beside messages"),
    "history of texts": (ALPACA | {"history": ["a", "b"]}, "history[0]: got a string, wanted a list of a question"),
    "history of one": (ALPACA | {"history": [["a"]]}, "history[0]: got a list, wanted a list of a question"),
    "history of a number": (ALPACA | {"history": [["a", 1]]}, "history[0][1]: got a number, wanted a string"),
    "two chats": (CHAT | {"conversations": []}, "got both messages and conversations"),
    "no text": ({"text": " \n"}, "text: got blanks alone"),
    "no completion": ({"prompt": "a", "response": "b"}, "completion: missing, got the keys ['prompt', 'response']"),
    "a call without a name": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]},
        "conversations[1].from 'function_call': got a call of a tool",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_obeyed_is_refused_by_name(write, row, reason):
    told = refusal(write([CHAT, row]))
    assert "data.jsonl:2: " in told and reason in told
    assert len(read(write([CHAT, row]), skip_bad_rows=True)) == 1


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_keys_that_say_nothing_refuse_nothing(write, value):
    keys = ("images", "videos", "tools", "label", "chosen", "rejected", "kto_tag", "functions", "system", "history")
    assert len(read(write([CHAT | dict.fromkeys(keys, value), ALPACA | dict.fromkeys(keys, value)]))) == 2
    turns = [USER | {"images": value, "weight": None}, ANSWER | {"tool_calls": value, "function_call": value}]
    assert read(write({"messages": turns}))[0].messages == (("user", "2+2?"), ("assistant", "4"))


def test_rows_that_are_to_be_learned_say_so(write):
    rows = [CHAT | {"label": True}, ALPACA | {"label": 1, "weight": 1}, {"text": "a", "label": "true"}]
    rows += [ALPACA | {"weight": weight} for weight in (None, "", "1")]  # as a CSV says it
    assert len(read(write(rows))) == 6
    for weight in (0, "0"):
        assert f"weight: got {weight!r}, wanted 1, or a weight on each" in refusal(write(ALPACA | {"weight": weight}))


def test_other_keys_are_counted(write):
    unread = Counter()
    rows = [
        ALPACA | {"id": 1, "text": "Below is ..."},
        ALPACA | {"id": 2, "text": "", "label": True},
        {
            "messages": [USER | {"name": "Ann"}, ANSWER | {"reasoning_content": "Hm.", "refusal": None}],
            "prompt": "2+2?",
        },
        {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "markdown": True}],
            "id": "x",
        },
    ]
    assert len(read(write(rows), unread=unread)) == 4
    assert unread == {
        "id": 3, "text": 1, "prompt": 1, "messages[].name": 1, "messages[].reasoning_content": 1,
        "conversations[].markdown": 1,
    }  # fmt: skip


# ---- chats of every spelling ----------------------------------------------------------------------------------------


def test_sharegpt(write):
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
    rows = [
        {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns]},
        {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b", "weight": 0}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        {"conversations": [USER, ANSWER]},
        {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "developer", "content": "s"}, USER, ANSWER]},
    ]
    found = read(write(rows))
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    assert found[0].messages == tuple((names[role], text) for role, text in turns)
    assert found[1].unlearned == {1} and found[2].messages[0] == ("system", "s")
    assert found[3].messages == (("user", "2+2?"), ("assistant", "4")) and found[4].messages[0] == ("user", "a")
    assert found[5].messages[0] == ("system", "s")
    for bad, reason in (
        ([{"from": "gpt", "value": "b"}], "conversations[0].from: got 'gpt', wanted 'human' or a system message"),
        ([{"from": "human", "value": "b"}], "conversations: got user as the last role, wanted assistant"),
        ([{"from": "alien", "value": "b"}], "conversations[0].from: got 'alien', wanted"),
        ([{"from": "human"}], "conversations[0].value: missing, got the keys ['from']"),
        ([{"from": "human", "value": "a"}] * 2, "conversations[1].from: got 'human', wanted 'gpt'"),
    ):
        assert reason in refusal(write({"conversations": bad}))


def test_parts_of_text_are_joined(write):
    parts = [{"type": "text", "text": "2"}, {"type": "text", "text": "+2?"}]
    (row,) = read(write({"messages": [USER | {"content": parts}, ANSWER | {"content": parts[:1]}]}))
    assert row.messages == (("user", "2\n+2?"), ("assistant", "2"))


def sharegpt_tools():
    turns = [
        ("human", "Weather in Bern?"), ("function_call", json.dumps(CALL)), ("observation", "rain"),
        ("gpt", "It rains."),
    ]  # fmt: skip
    return {"conversations": [{"from": f, "value": v} for f, v in turns], "tools": json.dumps([TOOL])}


def test_tools_under_the_checkpoints_own_template(write, tokenizers):
    text_arguments = json.loads(json.dumps(TOOL_CHAT))
    text_arguments["messages"][1]["tool_calls"][0]["function"]["arguments"] = json.dumps(CALL["arguments"])
    said = set()
    for row in read(write([TOOL_CHAT, text_arguments, sharegpt_tools()]), with_tools=True):
        whole, learned = trained(row, "template", tokenizers)
        said.add((whole, learned))
        for one in (row, replace(row, more={}), replace(row, tools=())):  # tools that may be called, and that are
            with pytest.raises(DataError, match="the row calls tools, which --prompt-style template alone can say"):
                trained(one, "chatml", tokenizers)
    ((whole, learned),) = said
    call = json.dumps(CALL)
    assert f"<|im_start|>tools {json.dumps([TOOL])}<|im_end|>" in whole and "<|im_start|>tool rain<|im_end|>" in whole
    assert learned == f"{call}<|im_end|>It rains.<|im_end|>"
    bad = json.loads(json.dumps(TOOL_CHAT))
    bad["messages"].pop(2)
    assert "messages[2].role: got 'assistant', wanted 'tool'" in refusal(write(bad), with_tools=True)
    bad = sharegpt_tools()
    bad["conversations"][1]["value"] = "no JSON"
    assert "conversations[1]: got 'no JSON', wanted JSON" in refusal(write(bad), with_tools=True)


def test_a_call_of_a_tool_has_its_result_and_a_prompt_may_end_in_one():
    """Another question in place of the result would teach a model not to wait for it."""
    call, result = TOOL_CHAT["messages"][1:3]
    for turns in ([USER, call, USER], [USER, call, ANSWER]):
        with pytest.raises(BadRow, match=r"messages\[2\].role: got '(user|assistant)', wanted 'tool'"):
            parse_chat(turns, "messages", True, True, set())
    chat = parse_chat([USER, call, result], "messages", False, True, set())
    assert [role for role, _ in chat.messages] == ["user", "assistant", "tool"]
    with pytest.raises(BadRow, match="messages: got tool as the last role, wanted assistant"):
        parse_chat([USER, call, result], "messages", True, True, set())


def test_after_the_result_of_a_call_and_its_answer_a_chat_goes_on():
    """With a question as with another call, each of which may have its own result; a call may want no arguments."""
    call, result = TOOL_CHAT["messages"][1:3]
    bare = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": ""}}]}
    turns = [USER, call, result, bare, result, ANSWER, USER | {"weight": 0}, ANSWER]
    chat = parse_chat(turns, "messages", True, True, set())
    assert [role for role, _ in chat.messages] == [turn["role"] for turn in turns] and not chat.unlearned
    assert sorted(chat.more) == [1, 2, 3, 4]
    assert [call["function"] for call in chat.more[3]["tool_calls"]] == [{"name": "look", "arguments": {}}]


def test_calls_of_tools_stay_with_their_message_behind_a_system_text_of_its_own(write):
    within = TOOL_CHAT | {"messages": [{"role": "system", "content": "Be brief."}, *TOOL_CHAT["messages"]]}
    (row,), (wanted,) = (read(write(chat), with_tools=True) for chat in (TOOL_CHAT | {"system": "Be brief."}, within))
    assert row.more and row.more == wanted.more
    assert (row.messages, row.unlearned, row.tools) == (wanted.messages, wanted.unlearned, wanted.tools)


@pytest.mark.parametrize("kind", ["messages", "prompt"])
@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_text_of_its_own_moves_no_loss_to_another_message(write, kind, key):
    """Neither where an answer has weight 0 nor where it stands in a prompt."""
    silent = ANSWER | {"weight": 0}
    turns = {"messages": [USER, silent, USER, ANSWER]}
    if kind == "prompt":
        turns = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    within = {kind: [{"role": "system", "content": "Be brief."}, *turns[kind]]}
    plain, own, wanted = read(write([turns, turns | {key: "Be brief."}, turns | within]))
    assert plain.unlearned == {1} and own.unlearned == wanted.unlearned == {2} and own.messages == wanted.messages


def test_a_prompt_may_end_in_an_answer_which_carries_no_loss_and_its_completion_has_all_turns(write):
    row = {"prompt": [USER, ANSWER], "completion": [USER, ANSWER | {"content": "5"}]}
    for require_answers in (True, False):
        (found,) = read(write(row), require_answers=require_answers)
        assert [text for _, text in found.messages] == ["2+2?", "4", "2+2?", "5"] and found.unlearned == {1}


@pytest.mark.parametrize("first, second", [(0, 1), (1, 0), (0, 0), (1, 1), (None, 0), (0, None)])
def test_an_answer_is_learned_where_every_weight_says_so(write, first, second):
    (row,) = read(write({"messages": [USER, ANSWER | {"weight": first, "train": second}]}))
    assert row.unlearned == (set() if first == second == 1 else {1})


def test_a_template_that_leaves_out_tools_is_refused(write, tmp_path):
    """SmolLM2's is one: the call would be learned as an immediate end of the turn."""
    plain = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
    calls = plain.replace("<|im_end|>", "{{ m.tool_calls[0].function | tojson if m.tool_calls else '' }}<|im_end|>")
    tools, silent = (
        "{{ tools | tojson }}" + calls,
        "{{ tools | tojson }}" + calls.replace("{{ m.content }}", "{{ m.content if m.role != 'tool' else '' }}"),
    )
    (whole,) = read(write(TOOL_CHAT), with_tools=True)
    (untold,) = read(write({"messages": TOOL_CHAT["messages"]}), with_tools=True)
    for name, template, row, left_out in (
        ("a", plain, whole, "tools"), ("b", plain, untold, "the calls of a tool in message 2"),
        ("c", calls, whole, "tools"), ("d", silent, whole, "the result of a tool in message 3"),
        ("e", tools, whole, None), ("f", calls, untold, None),
        ("g", tools.replace("m.content", "m.content | trim"), whole, None),  # blanks of a result say nothing
    ):  # fmt: skip
        own = {"template": load_tokenizer(write_byte_level(tmp_path / name, CHATML, chat_template=template))}
        if left_out is None:
            assert "get_weather" in trained(row, "template", own)[1]
        else:
            with pytest.raises(DataError, match=f"data.jsonl:1: .* leaves out {left_out}, so it would not be learned"):
                trained(row, "template", own)


# ---- text without a template ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["alpaca", "chatml", "llama3", "template"])
def test_a_prompt_of_text_is_completed_as_it_is(write, tokenizers, style):
    prompt, text = read(write([{"prompt": "Q: 2+2?\nA:", "completion": " 4"}, {"text": "Once upon a time."}]))
    bos, eos = ("<|begin_of_text|>", "<|end_of_text|>") if style == "llama3" else ("<s>", "</s>")
    assert trained(prompt, style, tokenizers) == (f"{bos}Q: 2+2?\nA: 4{eos}", f" 4{eos}")
    assert trained(text, style, tokenizers) == (f"{bos}Once upon a time.{eos}", f"Once upon a time.{eos}")
    asked = read(write([{"prompt": "Q: 2+2?\nA:"}, {"text": "Q: 2+2?\nA:"}], "asked"), require_answers=False)
    assert [encode_prompt(row, tokenizers[style], style) for row in asked] == 2 * [
        encode_prompt(prompt, tokenizers[style], style)
    ]


def test_a_prompt_and_a_completion_of_messages(write, tokenizers):
    """As in TRL: what the prompt holds of answers is not learned."""
    row = {"prompt": [USER, ANSWER | {"content": "5"}, USER], "completion": [ANSWER]}
    (chat,) = read(write(row))
    whole, learned = trained(chat, "chatml", tokenizers)
    assert "5" in whole and learned == "4<|im_end|>"
    assert "completion: missing" in refusal(write({"prompt": [USER]}))
    assert "completion: got a string, wanted a list" in refusal(write({"prompt": [USER], "completion": "4"}))
    assert "got user as the last role" in refusal(write({"prompt": [USER], "completion": []}))
    system = row | {"system": "s"}
    (chat,) = read(write(system))
    assert chat.messages[0] == ("system", "s") and trained(chat, "chatml", tokenizers)[1] == "4<|im_end|>"


# ---- files ----------------------------------------------------------------------------------------------------------

ROWS = [ALPACA | {"input": str(i), "output": 'a, "b"\n;é' * (i % 3)} for i in range(2500)]


def as_csv(rows, **options):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def texts(rows):
    return [(row.instruction, row.input, row.output) for row in rows]


FILES = {
    "rows.csv": as_csv(ROWS), "excel.csv": "\ufeff" + as_csv(ROWS, delimiter=";"),
    "rows.tsv": as_csv(ROWS, delimiter="\t"), "quoted.csv": as_csv(ROWS, quoting=csv.QUOTE_ALL, lineterminator="\n"),
    "rows.csv.gz": gzip.compress(as_csv(ROWS).encode()), "rows.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "rows.gz": gzip.compress("\n".join(map(json.dumps, ROWS)).encode()), "odd.csv": json.dumps(ROWS),
    "unlike.txt": gzip.compress(json.dumps(ROWS).encode()),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_each_kind(write, name):
    calls = []
    path = write(FILES[name], name)
    rows = read(path, progress=lambda done, total: calls.append((done, total)))
    assert texts(rows) == texts(read(write(ROWS)))
    assert calls == sorted(calls) and calls[-1] == (path.stat().st_size,) * 2 and calls[0][0] <= calls[0][1]


def test_csv_cells(write):
    path = write('instruction,input,output,id\nSay hi,,hi,1\n\n"two\nlines",,"a ""b""",2\nlast,,x,3', "rows.csv")
    unread = Counter()
    assert texts(read(path, unread=unread)) == [("Say hi", "", "hi"), ("two\nlines", "", 'a "b"'), ("last", "", "x")]
    assert [row.source.rpartition(":")[2] for row in read(path)] == ["2", "4", "6"] and unread == {"id": 3}
    assert read(write("prompt,completion\r\na,b\r\n", "p.csv"))[0].is_raw
    broken = {
        "instruction,output\na,b,c\nd,e\n": ":2: got 3 cells, wanted 2",
        "instruction,output\na\nd,e\n": ":2: got 1 cells, wanted 2",
        'instruction,output\na,"b\nd,e\n': ":2: no CSV from here on",
        'instruction,output\na,"b"c\nd,e\n': ":2: no CSV from here on",
        "instruction,instruction\na,b\n": "wanted a first line that names each column once",
        "instruction,,output\na,b,c\n": "wanted a first line that names each column once",
        "sep=;\r\ninstruction;output\r\na;b\r\n": "delete lines above it, and columns without a name",
        "instruction,output\n": "got no rows",
        "q,a\nx,y\n": "instruction: missing, got the keys ['q', 'a']",
        b"instruction,output\na,\xff\nd,e\n": ":2: output: got invalid UTF-8",
        b"instruction,output\na,\xe9\n": "got 1 bad of 1 rows, wanted none; save the file as UTF-8 (Excel: CSV UTF-8)",
    }
    for content, reason in broken.items():
        assert reason in refusal(write(content, "bad.csv"))
    assert len(read(write(b"instruction,output\na,\xff\nd,e\n", "bad.csv"), skip_bad_rows=True)) == 1
    assert "or as .csv" in refusal(write("instruction,output\na,b\n", "bad.txt"))


def test_parquet(write, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=999)
    path, calls = tmp_path / "rows.parquet", []
    assert texts(read(path, progress=lambda *call: calls.append(call))) == texts(read(write(ROWS)))
    assert calls == sorted(calls) and calls[-1] == (path.stat().st_size,) * 2
    chats = [sharegpt_tools() | {"messages": None}, CHAT | {"tools": ""}]
    parquet.write_table(pyarrow.Table.from_pylist(chats), path)
    assert read(path, skip_bad_rows=True)[0].messages == (("user", "2+2?"), ("assistant", "4"))
    odd = pyarrow.table({"instruction": ["a", "b"], "output": [b"x", b"y"]})
    parquet.write_table(odd, path)
    assert "rows.parquet row 1: output: got a bytes, wanted a string" in refusal(path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-30] + bytes(30)):
        path.write_bytes(content)
        assert "no sound parquet file" in refusal(path)


def test_parquet_without_its_library(write, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    told = refusal(write(b"PAR1" + bytes(100), "rows.parquet"))
    assert "wants pyarrow: pip install 'cria-engine[parquet]'" in told and "\n" not in told


PRETTY = json.dumps(ALPACA, indent=2)
NOT_WHAT_IT_SEEMS = {
    "a pretty object": (PRETTY, "got a JSON object over several lines, wanted rows in a list"),
    "pretty objects": (f"{PRETTY}\n{PRETTY}\n", "got a JSON object over several lines"),
    "a pretty chat": (json.dumps(CHAT, indent=1), "got a JSON object over several lines"),
    "wrapped": (json.dumps({"data": [ALPACA]}), "rows are under the key 'data'"),
    "wrapped, many": (json.dumps({"version": 1, "train": [ALPACA] * 9}, indent=4), "rows are under the key 'train'"),
    "wrapped twice": (json.dumps({"data": {"meta": 1, "train": [CHAT, CHAT]}}), "under the key 'data.train'"),
    "features and rows": (
        json.dumps({"features": [{"name": "x"}], "rows": [{"row": ALPACA}] * 3}), "under the key 'rows'",
    ),
    "by number": (json.dumps({"0": ALPACA, "1": ALPACA}), "under the key of each"),
    "by number, how": (json.dumps({"0": ALPACA, "1": ALPACA}), "as `jq '[.[]]'` does"),
    "lists of a column": (json.dumps({key: [text] for key, text in ALPACA.items()}), "keys are columns"),
    "pandas": (json.dumps({key: {"0": text} for key, text in ALPACA.items()}), "to_json(FILE, orient='records'"),
    "pandas' chats": (json.dumps({"messages": {"0": CHAT["messages"]}, "id": {"0": 1}}), "keys are columns"),
    "an old sheet": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "an Excel workbook of the old kind (.xls)"),
    "an excel's unicode text": ("instruction\toutput\r\na\tb\r\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8 FILE"),
    "a pointer": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 22\n", "a git-lfs pointer, not the data",
    ),
    "a zip": (b"PK\3\4" + bytes(50), "a zip archive or an Excel sheet"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(50), "a zstd archive; unpack it"),
    "a page": ("\n<!DOCTYPE html><html>404</html>", "a web page or XML; download the data itself"),
    "an arrow stream": (b"\xff\xff\xff\xff" + bytes(60), "an Arrow stream"),
    "half a gzip": (gzip.compress(json.dumps([ALPACA] * 99).encode())[:60], "a gzip file that cannot be unpacked"),
    "gzip of nothing": (gzip.compress(b""), "a gzip file of nothing"),
    "a gzipped pointer": (gzip.compress(b"version https://git-lfs.github.com/spec/v1\n"), "a git-lfs pointer"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), NOT_WHAT_IT_SEEMS.values(), ids=NOT_WHAT_IT_SEEMS)
@pytest.mark.parametrize("name", ["data.json", "data.csv", "data.parquet"])
def test_a_file_that_is_not_what_it_seems_is_told_in_one_line(write, content, reason, name):
    for skip in (False, True):
        told = refusal(write(content, name), skip_bad_rows=skip)
        assert reason in told and "\n" not in told and len(told) < 400, told


def test_rows_by_other_names_are_told_the_names(write):
    told = refusal(write([{"question": "a", "answer": "b"}, {"instruction": "a", "response": "b"}]))
    assert "no row is left; rename their keys to instruction and output, messages, conv" in told
    assert "rename" not in refusal(write([{"question": "a"}, ALPACA | {"output": 5}]))
    nulls = {"messages": "a list", "conversations": "a list", "prompt": "a string", "text": "a string"}
    for key, wanted in nulls.items():
        assert f":1: {key}: got null, wanted {wanted}" in refusal(write({key: None, "completion": "b"}))


def test_what_is_on_no_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    remedies = {
        "https://example.org/rows.json": "nothing is fetched from an address: download the file",
        "s3://bucket/rows.jsonl": "nothing is fetched from an address",
        "tatsu-lab/alpaca": "`hf download --repo-type dataset tatsu-lab/alpaca --local-dir DIR` fetches the files",
        "folder/rows": "check path and permissions",
        "rows.jsonl": "check path and permissions",
    }
    for name, remedy in remedies.items():
        told = refusal(Path(name))
        assert "got 'No such file or directory'" in told and remedy in told and "\n" not in told
        assert ("check path" in told) == ("check path" in remedy)


def test_a_line_of_a_csv_without_end_is_never_read_whole(write, monkeypatch):
    monkeypatch.setattr("engine.data.table_files.MAX_ROW_BYTES", 1000)
    long = "instruction,output\na,b\n" + "x" * 5000
    assert "data.csv:3: no CSV from here on: a line of more than 1000 bytes" in refusal(write(long, "data.csv"))
    assert len(read(write("instruction,output\n" + f"a,{'b' * 990}\n" * 3 + "c," + "d" * 990, "data.csv"))) == 4
    for n, is_read in ((1000, True), (1001, False)):  # a last line without a newline
        last = write("instruction,output\nc," + "d" * (n - 2), "data.csv")
        assert (len(read(last)) == 1) if is_read else "a line of more than" in refusal(last)


def test_one_row_in_a_file_is_a_row(write):
    assert len(read(write(json.dumps(ALPACA)))) == len(read(write(json.dumps(CHAT) + "\n"))) == 1
    rows = {"messages": CHAT["messages"], "extra": [{"a": 1}]}
    assert len(read(write(json.dumps(rows)))) == 1
    assert "output: got a list, wanted a string" in refusal(write(json.dumps(ALPACA | {"output": ["a"]})))


@pytest.mark.parametrize(
    "broken", ['{"instruction": "a", "output": "b"', '{"instruction": "a, "output": "b"}', '{"a": [}']
)
def test_a_broken_first_line_is_still_one_bad_row(write, broken):
    path = write(broken + "\n" + "".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    assert "data: got 1 bad of 5 rows" in refusal(path) and len(read(path, skip_bad_rows=True)) == 4


# ---- self-instruct --------------------------------------------------------------------------------------------------


def test_instances_of_self_instruct_are_read(write):
    unread = Counter()
    row = {
        "id": "t0",
        "instruction": "Add.",
        "instances": [{"input": "1 2", "output": "3"}],
        "is_classification": False,
    }
    (found,) = read(write(row), unread=unread)
    assert (found.instruction, found.input, found.output) == ("Add.", "1 2", "3") and "instances" not in unread
    (prompt,) = read(write({"instruction": "Add.", "instances": [{"input": "1 2"}]}), require_answers=False)
    assert (prompt.instruction, prompt.input) == ("Add.", "1 2")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"instances": [{"output": "a"}, {"output": "b"}]}, "instances: got 2, wanted one a row"),
        ({"instances": ["x"]}, "instances[0]: got a string"),
        ({"instances": {"output": "x"}}, "instances: got an object"),
        ({"instances": [{"output": "x"}], "input": "y"}, "got both input and instances"),
        ({"instances": [{"input": "x"}]}, "output: missing"),
    ],
)
def test_other_instances_are_refused(write, row, told):
    assert told in refusal(write({"instruction": "Add."} | row))


def test_evaluation_instructions_keep_their_inputs(tmp_path):
    rows = read(write_evaluation(tmp_path), require_answers=False)
    assert [(row.instruction, row.input) for row in rows] == [(ask, given) for _, ask, given, _ in EVALUATION]
    assert any(given for _, _, given, _ in EVALUATION) and not all(given for _, _, given, _ in EVALUATION)


def test_what_stands_beside_a_turn_belongs_to_its_role():
    odd = {"tool_call_id": "c9", "name": "x"}
    turns = [turn | odd for turn in TOOL_CHAT["messages"]]
    found = parse_chat(turns, "messages", True, True, set())
    assert {i: sorted(more) for i, more in found.more.items()} == {1: ["tool_calls"], 2: ["name", "tool_call_id"]}
    assert found.more[2] == odd
