"""Every bad input we know: how to bring it about, and the table of what is printed.

python tests/recipes/bad_input_cases.py    writes docs/bad_input.md anew
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training_runs import ROOT, Finished, Trainer, write_corpus

DOCUMENT = ROOT / "docs" / "bad_input.md"
HEADING = """# Bad input

Every mistake we know, the argument that makes it, and what `python train.py` prints on standard error: one line, and
no traceback. A config that is wrong ends with exit code 2 before anything is read or written, everything else with 1.
Checkpoints that were there stay as they are. Anything else that goes wrong is a bug and keeps its traceback;
`QLATRAIN_TRACEBACK=1` shows the traceback of these as well.

`RUN` is the run directory, `FILES` a folder of the user's, `CORPUS` one of twelve good text files, `HERE` the working
directory. `tests/recipes/test_pretrain_bad_input.py` runs every line, and `python tests/recipes/bad_input_cases.py`
prints them anew.

| bad input | arguments | printed |
|---|---|---|
"""


@dataclass(frozen=True)
class Place:
    """Where a case is set up."""

    run: Path  # the run directory: empty, or a copy of a finished run
    files: Path  # an empty folder
    corpus: Path

    def shown(self, text: str) -> str:
        """`text` with the names that the document uses for folders."""
        for path, name in ((self.run, "RUN"), (self.files, "FILES"), (self.corpus, "CORPUS"), (ROOT, "HERE")):
            text = text.replace(str(path), name)
        return text


@dataclass(frozen=True)
class Case:
    """`arguments(place)` sets the mistake up and gives the arguments that make it."""

    what: str
    arguments: Callable[[Place], list[str]]
    code: int = 1
    in_a_run: bool = False  # the run directory holds a finished run of 12 steps
    file_limit: int | None = None  # bytes a file may have: a disk that is full

    def run(self, trainer: Trainer, place: Place) -> tuple[list[str], Finished]:
        arguments = self.arguments(place)
        return arguments, trainer.run(place.run, *arguments, file_limit=self.file_limit)

    def row(self, place: Place, arguments: list[str], done: Finished) -> str:
        """Its line of the table."""
        cells = (self.what, f"`{' '.join(map(place.shown, arguments))}`", f"`{place.shown(done.err).strip()}`")
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def fixed(*arguments: str) -> Callable[[Place], list[str]]:
    return lambda place: list(arguments)


def text_files(**contents: str | bytes) -> Callable[[Place], list[str]]:
    """A corpus of these files; `_` in a name is its dot."""

    def write(place: Place) -> list[str]:
        for name, content in contents.items():
            content = content if isinstance(content, bytes) else content.encode()
            (place.files / name.replace("_", ".")).write_bytes(content)
        return [f"data.files=[{place.files}/*]"]

    return write


def chats(*turns: str, template: str = "bos_eos", **fields: object) -> Callable[[Place], list[str]]:
    """Three good conversations, and on the fourth line one of these turns and fields."""

    def write(place: Place) -> list[str]:
        here = ["data=conversations", "data.sequence_length=64", f"data.files=[{place.files}/*.jsonl]"]
        lines = [{"messages": messages(f"user: {i}?", "assistant: yes")} for i in range(3)]
        lines.append(({"messages": messages(*turns)} if turns else {}) | fields)
        (place.files / "a.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (place.files / "own.jinja").write_text("{{ raise_exception('no questions about ' + messages[0].content) }}")
        named = place.files / "own.jinja" if template == "own" else template
        return [*here, f"data.chat_template={named}"]

    return write


def messages(*turns: str) -> list[dict]:
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def too_long(place: Place) -> list[str]:
    return [*chats("user: " + "why " * 20, "assistant: because")(place), "data.too_long=error"]


def fits_in_no_row(place: Place) -> list[str]:
    return [*chats("user: why?", "assistant: because")(place), "data.sequence_length=16"]


def checkpoint(place: Place, step: int = 12) -> Path:
    return place.run / f"checkpoints/step-{step:08}"


def truncated(place: Place) -> list[str]:
    path = checkpoint(place) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return [f"resume={checkpoint(place)}"]


def other_format(place: Place) -> list[str]:
    path = checkpoint(place) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    return [f"resume={checkpoint(place)}"]


def file_in_the_way(place: Place) -> list[str]:
    (place.files / "file").write_text("")
    return [f"run.dir={place.files}/file/run"]


CONFIG = [
    Case("unknown key", fixed("train.stepz=100"), 2),
    Case("unknown key, added", fixed("+train.stepz=100"), 2),
    Case("unknown group", fixed("models=tiny"), 2),
    Case("unknown option of a group", fixed("schedule=cosin"), 2),
    Case("unknown choice", fixed("optim.name=muom"), 2),
    Case("unknown recipe", fixed("recipe=pretran"), 2),
    Case("unknown kind of layer", fixed("model.layer_pattern=[gdn,att]"), 2),
    Case("whole number expected", fixed("train.steps=many"), 2),
    Case("true or false expected", fixed("train.compile=maybe"), 2),
    Case("list expected", fixed("sample.prompts=word"), 2),
    Case("no value", fixed("train.steps=???"), 2),
    Case("not key=value", fixed("train.steps"), 2),
    Case("number too small", fixed("checkpoint.keep=0"), 2),
    Case("rows do not divide", fixed("train.global_batch_size=6", "train.micro_batch_size=4"), 2),
    Case("heads do not divide", fixed("model.linear_num_key_heads=3"), 2),
    Case("warm-up longer than the run", fixed("train.steps=10", "schedule.warmup_steps=10"), 2),
    Case("text without files", fixed("data.files=[]"), 2),
]
DATA = [
    Case("missing file", lambda place: [f"data.files=[{place.files}/corpus.jsonl]"]),
    Case("glob that matches nothing", lambda place: [f"data.files=[{place.files}/*.txt]"]),
    Case("folder instead of files", lambda place: [f"data.files=[{place.corpus}]"]),
    Case("unknown kind of file", text_files(a_doc="text")),
    Case("empty corpus", text_files(a_txt="", b_txt="")),
    Case("corpus of white space", text_files(a_txt=" \n", b_txt=" \n", c_txt=" ")),
    Case("corpus shorter than one row", text_files(a_txt="a few words", b_txt="and a few more")),
    Case("corpus of one document", text_files(a_txt="a few words" * 100)),
    Case("not UTF-8", text_files(a_txt=b"caf\xe9 " * 100, b_txt=b"caf\xe9 " * 100)),
    Case("not JSON", text_files(a_jsonl="{text: 3}\n")),
    Case("field that is not there", text_files(a_jsonl='{"content": "words"}\n')),
    Case("conversations of the standard library", fixed("data=stdlib", "data.format=conversations"), 2),
    Case("field of conversations that is not there", chats(text="words")),
    Case("conversation without an answer", chats("user: why?")),
    Case("unknown role", chats("user: why?", "asistant: because")),
    Case("message without content", chats("user:  ", "assistant: because")),
    Case("tokenizer without a chat template", chats("user: why?", "assistant: because", template="null")),
    Case("missing chat template", chats("user: why?", "assistant: because", template="chatnl")),
    Case("chat template that fails", chats("user: why?", "assistant: because", template="own")),
    Case("conversation longer than a row", too_long),
    Case("no conversation fits", fits_in_no_row),
    Case("missing dataset", lambda place: ["data=hf", f"data.dataset={place.files}/nothing"]),
    Case("missing tokenizer", lambda place: [f"data.tokenizer={place.files}/nothing"]),
    Case("tokenizer larger than the vocabulary", fixed("model.vocab_size=200")),
]
RESUME = [
    Case("path that is not there", lambda place: [f"resume={place.run}/checkpoints/step-99"], in_a_run=True),
    Case("folder that is no checkpoint", lambda place: [f"resume={place.run}/checkpoints"], in_a_run=True),
    Case("existing run, resume=never", fixed("resume=never"), in_a_run=True),
    Case("checkpoint of another model", fixed("model.hidden_size=48"), in_a_run=True),
    Case("checkpoint of other layers", fixed("model.layer_pattern=[gdn]"), in_a_run=True),
    Case("checkpoint of another optimizer", fixed("optim=adamw"), in_a_run=True),
    Case("checkpoint over another corpus", text_files(a_txt="word " * 99, b_txt="word " * 99), in_a_run=True),
    Case("truncated checkpoint", truncated, in_a_run=True),
    Case("checkpoint of another format", other_format, in_a_run=True),
]
MACHINE = [
    Case("full disk while saving a checkpoint", fixed("train.steps=14"), in_a_run=True, file_limit=90_000),
    Case("full disk while saving the model", fixed("track.log_every=99"), in_a_run=True, file_limit=90_000),
    Case("full disk at the start", fixed(), file_limit=1000),
    Case("run directory that cannot be made", file_in_the_way),
    Case("kernel that cannot run here", fixed("kernel.gated_delta_rule=tilelang")),
    Case("gradients that are not finite", fixed("optim.lr=1e30", "optim.muon_lr=1e30", "train.max_skipped_steps=3")),
]
CASES = [*CONFIG, *DATA, *RESUME, *MACHINE]


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "corpus").mkdir()
        trainer = Trainer(write_corpus(folder / "corpus"), folder / "output")
        finished = trainer.run(folder / "finished", "checkpoint.keep=3")
        assert finished.code == 0, finished.err
        rows = []
        for number, case in enumerate(CASES):
            place = Place(folder / str(number) / "run", folder / str(number) / "files", trainer.corpus)
            place.files.mkdir(parents=True)
            if case.in_a_run:
                shutil.copytree(folder / "finished", place.run)
            rows.append(case.row(place, *case.run(trainer, place)))
        DOCUMENT.write_text(HEADING + "\n".join(rows) + "\n")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
