"""``python -m pipeline.chat RUN``: talk to the model, switch personas in the middle of the talk."""

import sys
from typing import Any

from pipeline.cli import note, parse, quiet_libraries, run
from pipeline.config import ChatConfig, check_gamma
from pipeline.errors import UserError
from pipeline.terminal import printable

DESCRIPTION = "Talk to the model under its personas. Type /help in the chat for its commands."
HELP = """commands:
  /persona NAME     go on as NAME; /persona none for the unmasked model. The whole talk is read again under the
                    new persona (the KV cache is recomputed with every answer)
  /personas         list the personas
  /compare TEXT     answer TEXT once per persona, side by side, outside the talk
  /gamma X          keep the share X of the removed weights, 0 <= X < 1
  /reset            forget the talk
  /help, /quit"""


class Chat:
    """State of one talk: the messages so far, the persona, the gate."""

    def __init__(self, model: Any, config: ChatConfig) -> None:
        from pipeline.data.prompts import Prompter

        self.model, self.config, self.gamma = model, config, config.gamma
        self.prompter = Prompter(model.tokenizer)
        self.persona: str | None = None
        self.messages: list[tuple[str, str]] = []
        self.switch(config.persona or "none")

    def handle(self, line: str) -> bool:
        """Act on one line; False ends the chat. Raises UserError for a bad command."""
        command, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if command in ("/quit", "/exit"):
            return False
        if not command:
            return True
        if not command.startswith("/"):
            self.say(line.strip())
        elif command == "/persona":
            self.switch(rest)
        elif command == "/personas":
            print(", ".join(("none", *self.model.personas)))
        elif command == "/compare":
            self.compare(rest)
        elif command == "/gamma":
            self.set_gamma(rest)
        elif command == "/reset":
            self.messages = []
        elif command == "/help":
            print(HELP)
        else:
            raise UserError(f"unknown command {command}; /help lists them")
        return True

    def switch(self, name: str) -> None:
        if not name:
            raise UserError(f"/persona needs a name: none, {', '.join(self.model.personas)}")
        persona = None if name == "none" else name
        self.model.switch(persona, self.gamma if persona else 0.0)
        self.persona = persona

    def set_gamma(self, text: str) -> None:
        try:
            gamma = float(text)
        except ValueError:
            raise UserError(f"/gamma {text!r}: not a number") from None
        check_gamma(gamma)
        self.gamma = gamma
        self.switch(self.persona or "none")

    def say(self, text: str) -> None:
        """Answer within the talk, streamed."""
        from pipeline.generation import continue_from, printing_streamer

        print(f"{self.persona or 'unmasked'}: ", end="", flush=True)
        streamer = printing_streamer(self.model.tokenizer)
        c = self.config
        reply = continue_from(
            self.model, self.model.tokenizer, self._ids(text), c.max_new_tokens, c.temperature, streamer
        )
        self.messages += [("user", text), ("assistant", reply)]

    def compare(self, text: str) -> None:
        """One column per persona on a wide terminal, one block each otherwise."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        from pipeline.generation import answer

        if not text:
            raise UserError("/compare needs a question")
        table = Table(title=Text(printable(text)), show_lines=True)
        table.add_column("persona")
        table.add_column("answer")
        for persona in (None, *self.model.personas):
            with self.model.using(persona, self.gamma if persona else 0.0):
                reply = answer(
                    self.model,
                    self.prompter,
                    text,
                    max_new_tokens=self.config.max_new_tokens,
                    temperature=self.config.temperature,
                    system=self.config.system or None,
                )
            table.add_row(persona or "unmasked", Text(printable(reply)))
        Console().print(table)

    def _ids(self, text: str) -> Any:
        import torch

        device = self.model.get_input_embeddings().weight.device
        if not self.prompter.chat:
            return torch.tensor(
                [self.prompter.ids(self.prompter.prompt(text, self.config.system or None))], device=device
            )
        messages = [{"role": role, "content": content} for role, content in (*self.messages, ("user", text))]
        if self.config.system:
            messages = self.prompter.with_system(self.config.system, messages)
        rendered = self.model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return torch.tensor([self.prompter.ids(rendered)], device=device)


def chat(config: ChatConfig) -> None:
    """The loop at the terminal; ends with /quit or end of input."""
    import torch

    from pipeline.loading import pick_device
    from pipeline.model import PersonaModel

    torch.manual_seed(config.seed)
    device, dtype = pick_device(config.device), getattr(torch, config.precision)
    talk = Chat(PersonaModel.from_pretrained(config.run, config.model, dtype=dtype, device=device), config)
    if sys.stdin.isatty():
        import readline  # noqa: F401 - line editing and history for input()

    note(f"personas: {', '.join(talk.model.personas)}; /help for commands")
    while True:
        try:
            if not talk.handle(input("> ")):
                return
        except EOFError:
            return
        except UserError as error:
            note(f"error: {error}")


def main(argv: list[str] | None = None) -> int:
    config = parse(ChatConfig, DESCRIPTION, argv)
    quiet_libraries()
    return run(lambda: chat(config))


if __name__ == "__main__":
    sys.exit(main())
