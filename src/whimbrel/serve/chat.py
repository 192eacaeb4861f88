"""A conversation in the terminal: answers as they are written, thoughts dimmed, tokens per second after each.

Without a terminal, lines are read from standard input to its end; the answers alone go to standard output, thoughts and
figures to standard error. Control characters that a model writes are shown, not obeyed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console

from whimbrel.engine import Answer, Engine, Sampling
from whimbrel.errors import UserError, nearest

HELP = """\
/think [N]     think, at most N tokens (no limit without N)
/nothink       answer at once
/system TEXT   set the system message and start afresh
/reset         start afresh
/help          this list
/quit          leave (so does Ctrl-D, and Ctrl-C twice)
Ctrl-C stops an answer; what was written stays in the conversation."""
_COMMANDS = ("/think", "/nothink", "/system", "/reset", "/help", "/quit")
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_CONTROLS |= {code: 0xFFFD for code in range(0x80, 0xA0)}


class Chat:
    """Messages, settings and a console. `say` answers, `command` obeys a line that begins with a slash."""

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        system: str | None = None,
        console: Console | None = None,
        notes: Console | None = None,
    ) -> None:
        self.engine, self.sampling, self.system = engine, sampling, system
        self.console = console or Console(highlight=False)
        self.notes = notes or (self.console if self.console.is_terminal else Console(stderr=True, highlight=False))
        self.turns: list[dict[str, str]] = []

    def say(self, text: str) -> Answer | None:
        """Answer one message on the console. None if Ctrl-C stopped it or if it could not start, as a note says."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*head, *self.turns, {"role": "user", "content": text}]
        written, answer, kind = [], None, None
        stream = self.engine.stream(messages, self.sampling)
        try:
            for chunk in stream:
                where = self.console if chunk.kind == "answer" else self.notes
                if kind == "thinking" and chunk.kind == "answer":
                    self.notes.print()
                kind, answer = chunk.kind, chunk.answer
                if chunk.kind == "answer":
                    written.append(chunk.text)
                style = None if chunk.kind == "answer" else "dim"
                shown = chunk.text.translate(_CONTROLS)
                where.print(shown, end="", style=style, markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            self.note("\n(stopped)")
        except UserError as error:
            self.note(f"{error}\n/reset starts afresh")
            return None
        finally:
            stream.close()
        self.turns = [*messages[len(head) :], {"role": "assistant", "content": "".join(written)}]
        if answer is not None:
            (self.notes if kind == "thinking" else self.console).print()
            self.note(figures(answer))
        return answer

    def command(self, line: str) -> bool:
        """Obey one command; False ends the conversation."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/quit":
            return False
        if word == "/help":
            self.note(HELP)
        elif word == "/think" and (not rest or (rest.isdecimal() and len(rest) < 10 and int(rest) > 0)):
            self.sampling = replace(self.sampling, thinking_budget=int(rest) if rest else None)
            self.note(f"thinking, at most {rest} tokens" if rest else "thinking without a limit")
        elif word == "/think":
            self.note(f"/think {rest!r} is not a number of tokens above 0; write /think 256, or /nothink")
        elif word == "/nothink":
            self.sampling = replace(self.sampling, thinking_budget=0)
            self.note("answering at once")
        elif word == "/system":
            self.system, self.turns = rest or None, []
            self.note("a new conversation, " + ("with this system message" if rest else "without a system message"))
        elif word == "/reset":
            self.turns = []
            self.note("a new conversation")
        else:
            self.note(f"no command {word!r}; {nearest(word, _COMMANDS)}")
        return True

    def note(self, text: str) -> None:
        """A line that is not the model's."""
        self.notes.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def figures(answer: Answer) -> str:
    """What an answer took, in one line. The rate is of the tokens after the first, so the prompt does not count."""
    later = answer.seconds - answer.first_seconds
    rate = f"{(len(answer.ids) - 1) / later:.1f} tokens/s, " if later > 0 and len(answer.ids) > 1 else ""
    thought = f" ({answer.thinking_tokens} of them thought, {answer.thinking_ended})" if answer.thinking_tokens else ""
    cut = ", cut off by max_tokens" if answer.finish == "length" else ""
    return f"{len(answer.ids)} tokens{thought}, {rate}first after {answer.first_seconds:.2f} s{cut}"


def chat(
    engine: Engine,
    sampling: Sampling,
    *,
    once: str | None = None,
    system: str | None = None,
    console: Console | None = None,
) -> int:
    """Talk until the end; the exit code, 1 if an answer could not be given. `once`: answer only this message."""
    talk = Chat(engine, sampling, system, console)
    engine.start()
    if once is not None:
        return 0 if talk.say(once) is not None else 1
    if not sys.stdin.isatty():
        return _follow(talk)
    talk.note("Say something. /help lists the commands.")
    _converse(talk, lambda: talk.console.input("[bold]>[/bold] "))
    return 0


def _follow(talk: Chat) -> int:
    """Lines from standard input to its end."""
    failed = 0
    for line in sys.stdin:
        if line.startswith("/"):
            if not talk.command(line.strip()):
                break
        elif line.strip():
            failed |= talk.say(line.rstrip("\n")) is None
    return failed


def _converse(talk: Chat, read: Callable[[], str]) -> None:
    """A person at a terminal. Ctrl-C during an answer stops it; pressed again, or twice at the prompt, it leaves."""
    warned = False
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if warned:
                return
            warned = True
            talk.note("\nCtrl-C again, or /quit, to leave")
            continue
        if line.startswith("/"):
            if not talk.command(line):
                return
            warned = False
        elif line:
            warned = talk.say(line) is None
